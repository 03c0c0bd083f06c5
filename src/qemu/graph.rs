//! The block nodes below a guest's device, down to the files: formats, filters, backing files, data
//! files. `query-block` describes the node at the top only.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::client::Qmp;
use super::commands::{
    BlockDeviceInfo, BlockGraph, BlockGraphEdge, BlockGraphNode, ImageInfo, QueryNamedBlockNodes,
    XDebugQueryBlockGraph,
};
use super::error::QmpError;
use super::storage;

/// Nodes that are looked at below one device.
const LAYERS_MAX: usize = 256;
/// What the graph calls a block node.
const NODE: &str = "block-driver";

/// How what is written to a node is kept from being read below it. Rises with its worth.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encryption {
    #[default]
    None,
    /// By QEMU's own old format, which is known to be weak.
    Aes,
    /// By LUKS, and by what only a newer version knows.
    #[serde(other)]
    Luks,
}

impl Encryption {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "not encrypted",
            Self::Aes => "encrypted (legacy AES)",
            Self::Luks => "encrypted (luks)",
        }
    }
}

/// One node on the way from a guest's device down to the files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    pub node_name: String,
    /// Its driver, such as `qcow2`, `throttle` or `file`.
    pub driver: String,
    /// It is reached through a backing file only: the guest's writes never go there.
    pub backing: bool,
    pub is_leaf: bool,
    pub read_only: bool,
    /// Somebody else than the guest, its formats and jobs may write to it: a writable export.
    pub written_by_others: bool,
    pub encryption: Encryption,
    /// Its image, as QEMU names it.
    pub filename: String,
    /// What it occupies on its host, in bytes.
    pub actual_size: Option<u64>,
    /// Dirty bitmaps with a name.
    pub bitmaps: Vec<Bitmap>,
    /// Names of the snapshots inside the image.
    pub snapshots: Vec<String>,
}

/// A dirty bitmap of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    pub name: String,
    pub busy: bool,
    /// It is stored in the image.
    pub persistent: bool,
    /// It was not stored when its image was closed, and is worthless.
    pub inconsistent: bool,
}

/// What the topmost image of a disk stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// The topmost image, which the guest's writes go to; below filters.
    pub top_node: String,
    pub top_format: String,
    /// Its backing file, the first of a chain perhaps.
    pub node_name: String,
    /// Of the backing file, in bytes: what lies beyond it reads as zeroes.
    pub virtual_size: u64,
}

/// Drivers that pass everything on to the one node below them.
const FILTERS: [&str; 6] =
    ["throttle", "copy-on-read", "preallocate", "compress", "copy-before-write", "blkdebug"];

/// Drivers that hand each write to a server before it ends: nothing of it waits on this host for a flush.
const AT_SERVERS: [&str; 4] = ["nbd", "iscsi", "nfs", "ssh"];

/// All nodes of a QEMU and what is below what.
#[derive(Debug, Default)]
pub(super) struct Graph {
    nodes: BTreeMap<String, BlockDeviceInfo>,
    /// By the upper node; none when this QEMU does not tell.
    below: Option<BTreeMap<String, Vec<Child>>>,
    /// Nodes that an export, or what has no name either, may write to.
    written_by_others: BTreeSet<String>,
}

#[derive(Debug)]
struct Child {
    name: String,
    /// What it is to the node above: `file`, `backing`, `data-file`, ...
    role: String,
    is_backing: bool,
}

impl Child {
    fn new(name: &str, role: &str) -> Self {
        Self { name: name.to_owned(), role: role.to_owned(), is_backing: role == "backing" }
    }
}

impl Graph {
    /// Asks for all nodes.
    pub(super) async fn ask(qmp: &Qmp) -> Result<Self, QmpError> {
        let nodes = qmp.execute(QueryNamedBlockNodes { flat: true }).await?;
        let told = nodes.iter().any(|node| node.children.is_some()).then(|| told_children(&nodes));
        let asked = match qmp.execute(XDebugQueryBlockGraph).await {
            Ok(graph) => Some(graph),
            Err(e) if e.is_command_not_found() => None,
            Err(e) => return Err(e),
        };
        let written_by_others = asked.as_ref().map(written_by_others).unwrap_or_default();
        let below = asked.as_ref().map(asked_children).or(told);
        let nodes = nodes.into_iter().map(|node| (node.node_name.clone(), node)).collect();
        Ok(Self { nodes, below, written_by_others })
    }

    /// Whether this QEMU tells what is below its nodes.
    pub(super) fn is_known(&self) -> bool {
        self.below.is_some()
    }

    /// The nodes from `top` downwards, each once; with the writable way first.
    pub(super) fn layers(&self, top: &str) -> Vec<Layer> {
        let mut found: BTreeMap<String, Layer> = BTreeMap::new();
        let mut order = Vec::new();
        let mut waiting = vec![(top.to_owned(), false)];
        while let Some((name, backing)) = waiting.pop() {
            if let Some(seen) = found.get_mut(&name) {
                if !seen.backing || backing {
                    continue;
                }
                seen.backing = false;
            } else if let Some(layer) = self.layer(&name, backing) {
                order.push(name.clone());
                found.insert(name.clone(), layer);
            }
            if order.len() >= LAYERS_MAX {
                break;
            }
            let children = self.below.as_ref().and_then(|below| below.get(&name));
            for child in children.into_iter().flatten().rev() {
                waiting.push((child.name.clone(), backing || child.is_backing));
            }
        }
        order.iter().filter_map(|name| found.remove(name)).collect()
    }

    fn layer(&self, name: &str, backing: bool) -> Option<Layer> {
        let node = self.nodes.get(name)?;
        let children = self.below.as_ref().and_then(|below| below.get(name));
        let image = node.image.as_ref();
        let bitmaps = node.dirty_bitmaps.iter().filter(|bitmap| !bitmap.name.is_empty());
        Some(Layer {
            node_name: name.to_owned(),
            driver: node.drv.clone(),
            backing,
            is_leaf: children.is_none_or(Vec::is_empty),
            read_only: node.ro,
            written_by_others: self.written_by_others.contains(name),
            encryption: encryption(&node.drv, image),
            filename: image.map_or_else(|| node.file.clone(), |image| image.filename.clone()),
            actual_size: image.and_then(|image| image.actual_size),
            bitmaps: bitmaps
                .map(|b| Bitmap {
                    name: b.name.clone(),
                    busy: b.busy,
                    persistent: b.persistent,
                    inconsistent: b.inconsistent,
                })
                .collect(),
            snapshots: image.map_or_else(Vec::new, |i| i.snapshots.iter().map(|s| s.name.clone()).collect()),
        })
    }

    /// The topmost image below a device's node and its filters.
    pub(super) fn topmost<'a>(&'a self, device: &'a str) -> &'a str {
        let mut name = device;
        for _ in 0..LAYERS_MAX {
            let is_filter = self.nodes.get(name).is_some_and(|node| FILTERS.contains(&node.drv.as_str()));
            let children = self.below.as_ref().and_then(|below| below.get(name));
            match children.and_then(|children| children.first()) {
                Some(child) if is_filter => name = &child.name,
                _ => break,
            }
        }
        name
    }

    /// What the topmost image of this device's node stands on; none where that is nothing, or not told.
    pub(super) fn base(&self, device: &str) -> Option<Base> {
        let top = self.topmost(device);
        let (node, children) = (self.nodes.get(top)?, self.below.as_ref()?.get(top)?);
        let backing = self.nodes.get(&children.iter().find(|child| child.is_backing)?.name)?;
        Some(Base {
            top_node: top.to_owned(),
            top_format: node.drv.clone(),
            node_name: backing.node_name.clone(),
            virtual_size: backing.image.as_ref()?.virtual_size,
        })
    }

    /// Whether what is flushed to a node gets lost on its way to one of the images that are written to.
    pub(super) fn loses_flushes(&self, top: &str) -> bool {
        let written = self.layers(top).into_iter().filter(|layer| !layer.backing && !layer.read_only);
        let mut nodes = written.filter_map(|layer| self.nodes.get(&layer.node_name));
        nodes.any(|node| node.cache.no_flush)
    }

    /// Whether what was written to a node may wait in this host's memory for ever: QEMU flushes when it has stopped the
    /// guest, and neither that reaches one of the images nor do the writes themselves.
    pub(super) fn holds_back(&self, top: &str) -> bool {
        let images = self.layers(top).into_iter().filter(|layer| {
            layer.is_leaf
                && !layer.backing
                && !layer.read_only
                && !AT_SERVERS.contains(&layer.driver.as_str())
        });
        let mut nodes = images.filter_map(|layer| self.nodes.get(&layer.node_name));
        nodes.any(|node| node.cache.no_flush && !node.cache.direct)
    }

    /// How what a device shows lies in its images, in words that are the same on every host: `qcow2(backing=raw)`.
    /// None where that is not told. Two devices on the same images show the same only if this is the same.
    pub(super) fn layout(&self, top: &str) -> Option<String> {
        self.below.as_ref()?;
        Some(storage::bounded(self.layout_of(top, 0)))
    }

    fn layout_of(&self, name: &str, depth: usize) -> String {
        let Some(node) = self.nodes.get(name).filter(|_| depth < LAYERS_MAX) else { return "?".into() };
        let children = self.below.as_ref().and_then(|below| below.get(name));
        let mut children: Vec<&Child> = children.into_iter().flatten().collect();
        children.sort_by(|a, b| a.role.cmp(&b.role));
        let driver = node.drv.as_str();
        let file = children.iter().find(|child| child.role == "file" || child.role == "image");
        match (file, children.is_empty()) {
            (None, true) => "raw".into(),
            (Some(file), _) if FILTERS.contains(&driver) => self.layout_of(&file.name, depth + 1),
            (Some(file), _) if driver == "raw" => {
                let filename = node.image.as_ref().map_or(&node.file, |image| &image.filename);
                let below = self.layout_of(&file.name, depth + 1);
                match storage::offset(filename) {
                    None => below,
                    Some(offset) => format!("{below} from byte {offset}"),
                }
            }
            _ => {
                let below = children.iter().filter_map(|child| {
                    let below = self.layout_of(&child.name, depth + 1);
                    let is_plain = child.role == "file" && below == "raw";
                    (!is_plain).then(|| format!("{}={below}", child.role))
                });
                let below: Vec<String> = below.collect();
                if below.is_empty() { driver.into() } else { format!("{driver}({})", below.join(", ")) }
            }
        }
    }

    /// The least that protects what the guest writes from here on down, on any of its ways.
    pub(super) fn protection(&self, top: &str) -> Encryption {
        self.least(top, Encryption::None, 0)
    }

    fn least(&self, name: &str, so_far: Encryption, depth: usize) -> Encryption {
        let own = self.nodes.get(name).map_or(Encryption::None, |n| encryption(&n.drv, n.image.as_ref()));
        let here = so_far.max(own);
        let children = self.below.as_ref().and_then(|below| below.get(name));
        if depth >= LAYERS_MAX || here == Encryption::Luks {
            return here;
        }
        let written = children.into_iter().flatten().filter(|child| !child.is_backing);
        written.map(|child| self.least(&child.name, here, depth + 1)).min().unwrap_or(here)
    }
}

fn told_children(nodes: &[BlockDeviceInfo]) -> BTreeMap<String, Vec<Child>> {
    let children = |node: &BlockDeviceInfo| {
        let told = node.children.iter().flatten();
        told.map(|c| Child::new(&c.node_name, &c.child)).collect()
    };
    nodes.iter().map(|node| (node.node_name.clone(), children(node))).collect()
}

fn asked_children(graph: &BlockGraph) -> BTreeMap<String, Vec<Child>> {
    let names = names(graph, |node| node.kind == NODE);
    let mut below: BTreeMap<String, Vec<Child>> = BTreeMap::new();
    for edge in &graph.edges {
        if let (Some(parent), Some(child)) = (names.get(&edge.parent), names.get(&edge.child)) {
            below.entry((*parent).to_owned()).or_default().push(Child::new(child, &edge.name));
        }
    }
    below
}

/// The nodes that something without a name may write to: a guest's device has one.
fn written_by_others(graph: &BlockGraph) -> BTreeSet<String> {
    let nodes = names(graph, |node| node.kind == NODE);
    let others = names(graph, |node| node.kind == "block-backend" && node.name.is_empty());
    let writes = |edge: &&BlockGraphEdge| {
        others.contains_key(&edge.parent) && edge.perm.iter().any(|perm| perm == "write")
    };
    let written = graph.edges.iter().filter(writes).filter_map(|edge| nodes.get(&edge.child));
    written.map(|name| (*name).to_owned()).collect()
}

fn names(graph: &BlockGraph, which: impl Fn(&BlockGraphNode) -> bool) -> BTreeMap<u64, &str> {
    graph.nodes.iter().filter(|node| which(node)).map(|node| (node.id, node.name.as_str())).collect()
}

/// A node's own encryption.
pub(super) fn encryption(driver: &str, image: Option<&ImageInfo>) -> Encryption {
    let specific = image.and_then(|image| image.format_specific.as_ref());
    let format = specific.and_then(|s| match s.kind.as_str() {
        "rbd" => s.data.get("encryption-format"),
        _ => s.data.get("encrypt").and_then(|encrypt| encrypt.get("format")),
    });
    match format.and_then(|format| format.as_str()) {
        Some("aes") => Encryption::Aes,
        Some(_) => Encryption::Luks,
        None if driver == "luks" => Encryption::Luks,
        // The old `qcow` and whatever says no more than that.
        None if image.is_some_and(|image| image.encrypted) => Encryption::Aes,
        None => Encryption::None,
    }
}

/// The best encryption of an image and all that it stands on, by what is told without a graph.
pub(super) fn encryption_of_chain(driver: &str, image: &ImageInfo) -> Encryption {
    let mut best = encryption(driver, Some(image));
    let mut next = image.backing_image.as_deref();
    let mut seen = BTreeSet::new();
    while let Some(image) = next {
        best = best.max(encryption(&image.format, Some(image)));
        next = image.backing_image.as_deref().filter(|_| seen.len() < LAYERS_MAX);
        seen.insert(image.filename.clone());
    }
    best
}
