//! An If whose condition is known is analysed as the branch that it takes, and written as the If that it was where nothing of it is cut.

use super::*;
use vitrim::anatomy::Kind;
use vitrim::autodiff::interface::declare;
use vitrim::graph::{DType, DeclaredDim};
use vitrim::infer;
use vitrim::ops::control::known_branches;
use vitrim::pipeline::analyse;
use vitrim::slice;

fn branch(name: &str, node: NodeProto) -> AttributeProto {
    let output = info(&node.output[0]);
    let graph = GraphProto { name: Some(name.into()), node: vec![node], output: vec![output], ..Default::default() };
    AttributeProto {
        name: Some(format!("{name}_branch")),
        r#type: Some(attribute_type::GRAPH),
        g: Some(Box::new(graph)),
        ..Default::default()
    }
}

/// `y = If(c, Relu(x W), x W) V`, with `x` of `[n, 4]`.
fn chosen(condition: bool) -> Graph {
    let mut model = tiny();
    let g = graph(&mut model);
    let second = TensorProto { name: Some("V".into()), ..weight() };
    let c = TensorProto {
        name: Some("c".into()),
        data_type: Some(9),
        raw_data: Some(vec![u8::from(condition)].into()),
        ..Default::default()
    };
    g.initializer.extend([second, c]);
    let mut choose = named("choose", node("If", &["c"], &["z"]));
    choose.attribute = vec![branch("then", node("Relu", &["t"], &["a"])), branch("else", node("Neg", &["t"], &["b"]))];
    g.node = vec![node("MatMul", &["x", "W"], &["t"]), choose, node("MatMul", &["z", "V"], &["y"])];
    let mut graph = from_model(&model).unwrap().graph;
    let x = graph.find("x").unwrap();
    graph.set_declared(x, declare(DType::F32, vec![DeclaredDim::Symbol("n".into()), DeclaredDim::Size(4)]));
    graph
}

fn open(graph: &mut Graph) -> usize {
    let facts = infer::facts(graph).unwrap();
    let known = known_branches(graph, &facts);
    onnx::open_branches(graph, Path::new("m.onnx"), &known).unwrap()
}

fn ops_of(graph: &Graph) -> Vec<String> {
    to_model(graph).graph.unwrap().node.iter().map(|n| n.op_type().to_string()).collect()
}

#[test]
fn the_branch_that_is_taken_is_analysed_and_the_if_written_back() {
    for (condition, op) in [(true, "Relu"), (false, "Neg")] {
        let closed = chosen(condition);
        let mut graph = closed.clone();
        assert_eq!(open(&mut graph), 1);
        assert_eq!(check::check(&graph), []);
        let ops: Vec<&str> = graph.nodes().map(|(_, n)| n.op()).collect();
        assert_eq!(ops, ["MatMul", op, "MatMul"]);
        assert_eq!(to_model(&graph), to_model(&closed), "nothing changed");
    }
}

#[test]
fn a_branch_that_is_cut_stays_open() {
    let mut graph = chosen(true);
    assert!(analyse(&graph).unwrap().1.groups.is_empty(), "closed");
    open(&mut graph);
    let (facts, anatomy) = analyse(&graph).unwrap();
    let groups: Vec<(Kind, usize)> = anatomy.groups.iter().map(|g| (g.kind, g.units())).collect();
    assert_eq!(groups, [(Kind::Mlp, 4)]);
    let kept = [(anatomy.groups[0].id.clone(), vec![0, 3])].into();
    let sliced = slice::apply(&graph, &facts, &anatomy, &kept, &analyse).unwrap();
    assert_eq!(ops_of(&sliced.graph), ["MatMul", "Relu", "MatMul"]);
}

#[test]
fn conditions_that_are_gone_and_parameters_that_would_be_lost_are_seen() {
    // What the If would read is not there any more.
    let mut graph = chosen(true);
    open(&mut graph);
    let c = graph.find("c").unwrap();
    graph.take_initializer(c);
    assert_eq!(ops_of(&graph), ["MatMul", "Relu", "MatMul"]);
    // The other branch has a weight of its own.
    let mut model = to_model(&chosen(true));
    let choose = &mut model.graph.as_mut().unwrap().node[1];
    let other = choose.attribute[1].g.as_mut().unwrap();
    other.node = vec![node("MatMul", &["t", "U"], &["b"])];
    other.initializer = vec![TensorProto { name: Some("U".into()), ..weight() }];
    let mut graph = from_model(&model).unwrap().graph;
    assert_eq!(open(&mut graph), 0);
    assert!(graph.nodes().any(|(_, n)| n.op() == "If"));
}
