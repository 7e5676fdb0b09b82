//! The order of nodes as a file gives it: topological, out of order, or impossible.

/// Whether the nodes stand in topological order already; `reads[i]` are the nodes that node `i` reads from.
///
/// Errors: nodes on a cycle, in the direction of the data, the first one again at the end.
pub(super) fn is_topological(reads: &[Vec<usize>]) -> Result<bool, Vec<usize>> {
    const NEW: u8 = 0;
    const OPEN: u8 = 1;
    const DONE: u8 = 2;
    let mut state = vec![NEW; reads.len()];
    let mut path: Vec<(usize, usize)> = Vec::new();
    for start in 0..reads.len() {
        if state[start] != NEW {
            continue;
        }
        state[start] = OPEN;
        path.push((start, 0));
        while let Some((node, next)) = path.pop() {
            let Some(from) = reads[node].get(next).copied() else {
                state[node] = DONE;
                continue;
            };
            path.push((node, next + 1));
            match state[from] {
                NEW => {
                    state[from] = OPEN;
                    path.push((from, 0));
                }
                OPEN => {
                    let mut cycle: Vec<usize> = path.iter().map(|(n, _)| *n).skip_while(|n| *n != from).collect();
                    cycle.push(from);
                    cycle.reverse();
                    return Err(cycle);
                }
                _ => {}
            }
        }
    }
    Ok(reads.iter().enumerate().all(|(i, from)| from.iter().all(|f| *f < i)))
}

/// Item numbers in topological order, each at its place unless something that it reads stands behind it; `None` on a cycle.
pub(super) fn sorted(reads: &[Vec<usize>]) -> Option<Vec<usize>> {
    if is_topological(reads).ok()? {
        return Some((0..reads.len()).collect());
    }
    let mut done = vec![false; reads.len()];
    let mut order = Vec::with_capacity(reads.len());
    for start in 0..reads.len() {
        let mut path = vec![(start, 0)];
        while let Some((node, next)) = path.pop() {
            if done[node] {
                continue;
            }
            match reads[node].get(next) {
                Some(from) => path.extend([(node, next + 1), (*from, 0)]),
                None => {
                    done[node] = true;
                    order.push(node);
                }
            }
        }
    }
    Some(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_told_apart() {
        assert_eq!(is_topological(&[vec![], vec![0], vec![0, 1]]), Ok(true));
        assert_eq!(is_topological(&[vec![1], vec![]]), Ok(false));
        assert_eq!(is_topological(&[vec![], vec![2, 0], vec![3], vec![1]]), Err(vec![1, 3, 2, 1]));
        assert_eq!(is_topological(&[vec![0]]), Err(vec![0, 0]));
    }

    #[test]
    fn sorting_moves_only_what_must_move() {
        assert_eq!(sorted(&[vec![2], vec![], vec![1], vec![0]]), Some(vec![1, 2, 0, 3]));
        assert_eq!(sorted(&[vec![], vec![], vec![]]), Some(vec![0, 1, 2]));
        assert_eq!(sorted(&[vec![1], vec![0]]), None);
    }
}
