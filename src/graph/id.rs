//! Typed ids: a node id can never be used where a value id is meant.

use std::marker::PhantomData;

/// An index into one of the graph's tables.
pub trait Id: Copy + Ord {
    /// Id number `index`.
    fn new(index: usize) -> Self;
    /// The number behind the id.
    fn index(self) -> usize;
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $letter:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u32);

        impl Id for $name {
            fn new(index: usize) -> Self {
                Self(u32::try_from(index).expect("the reader limits counts far below 2^32"))
            }
            fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!($letter, "{}"), self.0)
            }
        }
    };
}

id!(
    /// A node of a graph.
    NodeId, "n"
);
id!(
    /// A value of a graph: a graph input, an initializer, or an output of a node.
    ValueId, "v"
);

/// A table with one entry per id, filled by an analysis and kept outside the graph.
#[derive(Clone, Debug)]
pub struct SideMap<K, V> {
    entries: Vec<V>,
    key: PhantomData<K>,
}

impl<K: Id, V: Clone> SideMap<K, V> {
    /// A table of `len` copies of `fill`.
    pub fn filled(len: usize, fill: V) -> Self {
        Self { entries: vec![fill; len], key: PhantomData }
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether the table has no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Makes room for ids up to `len`, new entries being copies of `fill`.
    pub fn grow(&mut self, len: usize, fill: V) {
        if self.entries.len() < len {
            self.entries.resize(len, fill);
        }
    }

    /// The entry of an id, where the table reaches that far.
    pub fn get(&self, id: K) -> Option<&V> {
        self.entries.get(id.index())
    }

    /// All entries in the order of their ids.
    pub fn iter(&self) -> impl Iterator<Item = (K, &V)> {
        self.entries.iter().enumerate().map(|(i, v)| (K::new(i), v))
    }
}

impl<K: Id, V> std::ops::Index<K> for SideMap<K, V> {
    type Output = V;
    fn index(&self, id: K) -> &V {
        &self.entries[id.index()]
    }
}

impl<K: Id, V> std::ops::IndexMut<K> for SideMap<K, V> {
    fn index_mut(&mut self, id: K) -> &mut V {
        &mut self.entries[id.index()]
    }
}
