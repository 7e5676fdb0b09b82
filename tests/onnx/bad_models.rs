//! Models that must be refused, each with its reason; rows as in the table of bad inputs.

use crate::*;

struct Case {
    row: u32,
    says: &'static str,
    code: &'static str,
    make: fn(&mut ModelProto),
}

const CASES: &[Case] = &[
    Case { row: 17, says: "model has no graph", code: "V0120", make: |m| m.graph = None },
    Case { row: 17, says: "model has no nodes", code: "V0121", make: |m| graph(m).node.clear() },
    Case { row: 35, says: "graph has no outputs", code: "V0122", make: |m| graph(m).output.clear() },
    Case { row: 18, says: "no opset for the default domain", code: "V0123", make: |m| m.opset_import.clear() },
    Case { row: 18, says: "no opset for the default domain", code: "V0123", make: |m| m.opset_import = vec![opset("a", 17)] },
    Case {
        row: 19,
        says: "opset 999 is not supported (11 to 26)",
        code: "V0124",
        make: |m| m.opset_import = vec![opset("", 999)],
    },
    Case { row: 19, says: "opset 10 is not supported", code: "V0124", make: |m| m.opset_import = vec![opset("ai.onnx", 10)] },
    Case { row: 19, says: "opset 17 and as opset 18", code: "V0125", make: |m| m.opset_import.push(opset("ai.onnx", 18)) },
    Case { row: 20, says: "ir_version is missing", code: "V0126", make: |m| m.ir_version = None },
    Case { row: 20, says: "ir_version 999 is not supported (3 to 13)", code: "V0126", make: |m| m.ir_version = Some(999) },
    Case { row: 20, says: "ir_version 2 is not supported", code: "V0126", make: |m| m.ir_version = Some(2) },
    Case {
        row: 21,
        says: "node B is of domain 'com.acme', which is not imported",
        code: "V0127",
        make: |m| graph(m).node.push(NodeProto { domain: Some("com.acme".into()), ..named("B", node("F", &["y"], &["z"])) }),
    },
    Case {
        row: 31,
        says: "graph has a cycle through node A -> B -> A",
        code: "V0130",
        make: |m| graph(m).node = vec![named("A", node("Add", &["x", "b"], &["y"])), named("B", node("Neg", &["y"], &["b"]))],
    },
    Case {
        row: 31,
        says: "cycle through node #0 (Add) -> #0 (Add)",
        code: "V0130",
        make: |m| graph(m).node = vec![node("Add", &["x", "y"], &["y"])],
    },
    Case {
        row: 33,
        says: "value y is produced by node A and node B",
        code: "V0131",
        make: |m| graph(m).node.push(named("B", node("Neg", &["x"], &["y"]))),
    },
    Case {
        row: 33,
        says: "value W is produced by an initializer and node B",
        code: "V0131",
        make: |m| graph(m).node.push(named("B", node("Neg", &["x"], &["W"]))),
    },
    Case { row: 33, says: "graph input x appears twice", code: "V0133", make: |m| graph(m).input.push(info("x")) },
    Case { row: 34, says: "initializer W appears twice", code: "V0132", make: |m| graph(m).initializer.push(weight()) },
    Case { row: 34, says: "initializer #0 has no name", code: "V0134", make: |m| w(m).name = None },
    Case {
        row: 35,
        says: "node A reads 'missing', which nothing produces",
        code: "V0135",
        make: |m| graph(m).node[0].input[0] = "missing".into(),
    },
    Case { row: 35, says: "graph output 'z' is produced by nothing", code: "V0136", make: |m| graph(m).output.push(info("z")) },
    Case { row: 38, says: "node #0 has no operator type", code: "V0137", make: |m| graph(m).node[0].op_type = None },
    Case {
        row: 38,
        says: "node A: attribute k must be an int, holds a float",
        code: "V0138",
        make: |m| attribute(m, |a| (a.r#type, a.f) = (Some(attribute_type::INT), Some(1.0))),
    },
    Case {
        row: 38,
        says: "attribute k holds both a float and an int",
        code: "V0138",
        make: |m| attribute(m, |a| (a.i, a.f) = (Some(1), Some(1.0))),
    },
    Case { row: 38, says: "attribute k holds nothing", code: "V0138", make: |m| attribute(m, |_| {}) },
    Case { row: 38, says: "attribute k has type 99", code: "V0138", make: |m| attribute(m, |a| a.r#type = Some(99)) },
    Case {
        row: 38,
        says: "attribute k refers to an attribute of a function",
        code: "V0138",
        make: |m| attribute(m, |a| a.ref_attr_name = Some("r".into())),
    },
    Case {
        row: 42,
        says: "initializer W: 8 bytes, shape [4,4] float32 needs 64",
        code: "V0150",
        make: |m| w(m).raw_data = Some(vec![0; 8].into()),
    },
    Case { row: 43, says: "72 bytes, shape [4,4]", code: "V0150", make: |m| w(m).raw_data = Some(vec![0; 72].into()) },
    Case { row: 42, says: "0 bytes, shape [4,4] float32 needs 64", code: "V0150", make: |m| w(m).raw_data = None },
    Case { row: 44, says: "initializer W: shape overflows", code: "V0151", make: |m| w(m).dims = vec![1 << 40, 1 << 40] },
    Case { row: 44, says: "shape overflows", code: "V0151", make: |m| w(m).dims = vec![1 << 40, 1 << 40, 0] },
    Case { row: 45, says: "64 bytes, shape [1048576,65536]", code: "V0150", make: |m| w(m).dims = vec![1 << 20, 1 << 16] },
    Case { row: 46, says: "initializer W has the negative dimension -4", code: "V0152", make: |m| w(m).dims = vec![-4, 4] },
    Case { row: 47, says: "initializer W has type 77, not supported", code: "V0153", make: |m| w(m).data_type = Some(77) },
    Case { row: 47, says: "initializer W has type 0, not supported", code: "V0153", make: |m| w(m).data_type = None },
    Case {
        row: 48,
        says: "initializer W has two data fields, raw_data and float_data",
        code: "V0154",
        make: |m| w(m).float_data = vec![0.0; 16],
    },
    Case {
        row: 48,
        says: "is of type float16, which float_data cannot hold",
        code: "V0155",
        make: |m| set_data(m, 10, &[2], |t| t.float_data = vec![1.0, 2.0]),
    },
    Case {
        row: 48,
        says: "initializer W: 3 elements in int32_data, shape [2] int8 needs 2",
        code: "V0150",
        make: |m| set_data(m, 3, &[2], |t| t.int32_data = vec![1, 2, 3]),
    },
    Case {
        row: 48,
        says: "initializer W: 300 in int32_data is no int8",
        code: "V0156",
        make: |m| set_data(m, 3, &[1], |t| t.int32_data = vec![300]),
    },
    Case {
        row: 48,
        says: "1 elements in string_data, shape [2] string needs 2",
        code: "V0150",
        make: |m| set_data(m, 8, &[2], |t| t.string_data = vec!["a".into()]),
    },
    Case {
        row: 48,
        says: "is of type string, which raw_data cannot hold",
        code: "V0155",
        make: |m| set_data(m, 8, &[2], |t| t.raw_data = Some("ab".into())),
    },
    Case { row: 48, says: "initializer W is a segment", code: "V0157", make: |m| w(m).segment = Some(Segment::default()) },
    Case {
        row: 62,
        says: "external data needs a file path",
        code: "V0160",
        make: |m| set_data(m, 1, &[1], |t| externalize(t, &[("location", "x.bin")])),
    },
    Case {
        row: 35,
        says: "node A reads 'gone', which nothing produces",
        code: "V0135",
        make: |m| {
            let body = GraphProto { node: vec![node("Relu", &["gone"], &["r"])], output: vec![info("r")], ..Default::default() };
            attribute(m, |a| a.g = Some(Box::new(body)));
        },
    },
    Case {
        row: 23,
        says: "function f.P -> f.P calls itself",
        code: "V0141",
        make: |m| function(m, NodeProto { domain: Some("f".into()), ..node("P", &["a"], &["b"]) }),
    },
    Case {
        row: 23,
        says: "function f.P is written for opset 18 of domain '', the model for 17",
        code: "V0142",
        make: |m| {
            function(m, node("Relu", &["a"], &["b"]));
            m.functions[0].opset_import[0].version = Some(18);
        },
    },
    Case {
        row: 23,
        says: "node call has 2 inputs, function f.P takes 1",
        code: "V0143",
        make: |m| {
            function(m, node("Relu", &["a"], &["b"]));
            graph(m).node[0].input.push("W".into());
        },
    },
    Case {
        row: 23,
        says: "node #0 of call has no operator type",
        code: "V0137",
        make: |m| function(m, NodeProto { op_type: None, ..node("", &["a"], &["b"]) }),
    },
    Case {
        row: 23,
        says: "function f.P is defined twice",
        code: "V0140",
        make: |m| {
            function(m, node("Relu", &["a"], &["b"]));
            m.functions.push(m.functions[0].clone());
        },
    },
    Case {
        row: 23,
        says: "node call/Relu_0 reads 'q', which nothing produces",
        code: "V0135",
        make: |m| function(m, node("Relu", &["q"], &["b"])),
    },
];

/// Makes the model a call of f.P(a) -> b with this body.
fn function(m: &mut ModelProto, body: NodeProto) {
    m.opset_import.push(opset("f", 1));
    m.functions.push(FunctionProto {
        name: Some("P".into()),
        domain: Some("f".into()),
        input: vec!["a".into()],
        output: vec!["b".into()],
        node: vec![body],
        opset_import: vec![opset("", 17), opset("f", 1)],
        ..Default::default()
    });
    graph(m).node = vec![named("call", NodeProto { domain: Some("f".into()), ..node("P", &["x"], &["y"]) })];
}

#[test]
fn bad_models_are_refused_with_the_reason() {
    assert!(from_model(&tiny()).is_ok());
    let mut failed = Vec::new();
    for (i, case) in CASES.iter().enumerate() {
        let mut model = tiny();
        (case.make)(&mut model);
        match from_model(&model) {
            Err(e) if e.to_string().contains(case.says) && e.code() == case.code && e.to_string().len() < 300 => {}
            Err(e) => failed.push(format!("case {i}, row {}: {} {e}", case.row, e.code())),
            Ok(_) => failed.push(format!("case {i}, row {}: accepted", case.row)),
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn functions_that_explode_are_refused() {
    // Twenty levels that double: a million nodes from forty.
    let mut m = tiny();
    m.opset_import.push(opset("f", 1));
    let at = |level: usize| if level == 0 { "Relu".to_string() } else { format!("F{level}") };
    for level in 1..=20 {
        let domain = (level > 1).then(|| "f".to_string());
        let call = |i: &str, o: &str| NodeProto { domain: domain.clone(), ..node(&at(level - 1), &[i], &[o]) };
        m.functions.push(FunctionProto {
            name: Some(at(level)),
            domain: Some("f".into()),
            input: vec!["a".into()],
            output: vec!["c".into()],
            node: vec![call("a", "b"), call("b", "c")],
            opset_import: vec![opset("", 17), opset("f", 1)],
            ..Default::default()
        });
    }
    graph(&mut m).node = vec![NodeProto { domain: Some("f".into()), ..node("F20", &["x"], &["y"]) }];
    assert_eq!(from_model(&m).unwrap_err().to_string(), "m.onnx: functions expand to more than 200000 nodes");
}

#[test]
fn odd_but_harmless_models_are_read_with_a_warning() {
    let warnings = |change: &dyn Fn(&mut ModelProto)| {
        let mut m = tiny();
        change(&mut m);
        from_model(&m).unwrap_or_else(|e| panic!("{e}")).warnings
    };
    let none: [&str; 0] = [];
    assert_eq!(warnings(&|_| {}), none);
    assert_eq!(warnings(&|m| m.opset_import[0].domain = Some("ai.onnx".into())), none);
    assert_eq!(warnings(&|m| m.ir_version = Some(14)), ["ir_version 14 is newer than the newest known, 13"]);
    assert_eq!(
        warnings(&|m| graph(m).node.insert(0, node("Neg", &["y"], &["z"]))),
        ["nodes are not in topological order: sorted"]
    );
    assert_eq!(
        warnings(&|m| graph(m).input.push(info("W"))),
        ["1 initializers are also listed as graph inputs: treated as constants"]
    );
    // Names may be empty, equal, or look like paths.
    assert_eq!(warnings(&|m| graph(m).node.push(named("../../x", node("Neg", &["y"], &["z"])))), none);
    assert_eq!(warnings(&|m| graph(m).node.push(named("A", node("Neg", &["y"], &["z"])))), none);
}

#[test]
fn names_are_made_harmless_in_messages() {
    let mut m = tiny();
    graph(&mut m).node[0].name = Some("a\u{1b}[31m\n\u{202e}<b>".into());
    graph(&mut m).node[0].input[0] = "q".repeat(3000);
    let message = from_model(&m).unwrap_err().to_string();
    assert!(!message.contains(|c: char| c.is_control() || c == '\u{202e}') && message.len() < 300, "{message}");
}
