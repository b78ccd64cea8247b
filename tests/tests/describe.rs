//! `cargo run -- describe`: what a device tree says, against a second reader of the same trees.
//!
//! The second reader is written here over another parser (`dtoolkit`), and goes other ways: it asks for one requester ID, one
//! address at a time where the kernel's reader computes tables. Trees are QEMU's own, hard cases made here, and, where
//! `SLUICE_DTBS` names a folder, every `.dtb` below it (such as Debian's `/usr/lib/linux-image-*`).
//!
//! Broken by hand and seen red: the mask not applied, `#iommu-cells` taken for 1, a disabled bus passed over, `dma-ranges` of the
//! bus above ignored, a root port taken for a host.

use dtoolkit::fdt::Fdt;
use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};
use dtoolkit::{Node as _, Property as _};
use qemu::firmware::workspace;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tests::runner::{self, Ran};

/// Runs `describe` with these arguments.
fn describe(arguments: &[&str], file: &Path) -> Ran {
    let mut command = Command::new(runner::program().unwrap());
    command.arg("describe").args(arguments).arg(file).stdin(Stdio::null()).output().unwrap().into()
}

/// What `describe --json` says of a file.
fn described(file: &Path) -> Value {
    let ran = describe(&["--json"], file);
    assert_eq!(ran.code, Some(0), "{}: {}", file.display(), ran.stderr);
    assert!(ran.stderr.is_empty(), "{}: {}", file.display(), ran.stderr);
    serde_json::from_str(&ran.stdout).unwrap()
}

// The second reader.

/// A node with what is needed of it.
struct Place {
    path: String,
    parent: Option<usize>,
    properties: HashMap<String, Vec<u8>>,
}

/// All nodes, the parent of each before it.
struct Places(Vec<Place>);

/// The big-endian words of a property.
fn words(value: &[u8]) -> Vec<u32> {
    value.chunks_exact(4).map(|word| u32::from_be_bytes(word.try_into().unwrap())).collect()
}

/// The number that these words are, the first of three being no part of it.
fn wide(words: &[u32]) -> u64 {
    let words = if words.len() == 3 { &words[1..] } else { words };
    words.iter().fold(0, |number, &word| number << 32 | u64::from(word))
}

impl Places {
    fn read(bytes: &[u8]) -> Self {
        // Its check has opinions on how long names may be that Linux's trees do not share.
        fn add(list: &mut Vec<Place>, node: &dtoolkit::fdt::FdtNode<'_>, parent: Option<usize>) {
            let path = match parent {
                None => "/".to_string(),
                Some(parent) => format!("{}/{}", list[parent].path.trim_end_matches('/'), node.name()),
            };
            let properties =
                node.properties().map(|found| (found.name().to_string(), found.value().to_vec())).collect();
            list.push(Place { path, parent, properties });
            let own = list.len() - 1;
            for child in node.children() {
                add(list, &child, Some(own));
            }
        }
        let mut list = Vec::new();
        add(&mut list, &Fdt::new_unchecked(bytes).root(), None);
        Self(list)
    }

    fn get(&self, at: usize, name: &str) -> Option<&[u8]> {
        self.0[at].properties.get(name).map(Vec::as_slice)
    }

    fn has(&self, at: usize, name: &str) -> bool {
        self.get(at, name).is_some()
    }

    fn words(&self, at: usize, name: &str) -> Vec<u32> {
        words(self.get(at, name).unwrap_or_default())
    }

    fn word(&self, at: usize, name: &str, default: u32) -> u32 {
        self.words(at, name).first().copied().unwrap_or(default)
    }

    fn texts(&self, at: usize, name: &str) -> Vec<String> {
        let text = String::from_utf8(self.get(at, name).unwrap_or_default().to_vec()).unwrap();
        text.split_terminator('\0').map(str::to_string).collect()
    }

    /// The node and all above it.
    fn chain(&self, at: usize) -> Vec<usize> {
        std::iter::successors(Some(at), |&at| self.0[at].parent).collect()
    }

    fn enabled(&self, at: usize) -> bool {
        self.chain(at).into_iter().all(|at| matches!(self.get(at, "status"), None | Some(b"okay\0" | b"ok\0")))
    }

    fn phandle(&self, phandle: u32) -> Option<usize> {
        (0..self.0.len()).find(|&at| self.words(at, "phandle") == [phandle])
    }

    fn coherent(&self, at: usize) -> bool {
        let says =
            self.chain(at).into_iter().find(|&at| self.has(at, "dma-coherent") || self.has(at, "dma-noncoherent"));
        says.is_some_and(|at| self.has(at, "dma-coherent"))
    }

    fn cells(&self, bus: usize) -> (usize, usize) {
        (self.word(bus, "#address-cells", 2) as usize, self.word(bus, "#size-cells", 1) as usize)
    }

    /// Where `address` on `bus` is one level up; `None` if it is not passed on.
    fn up(&self, bus: usize, property: &str, address: u64) -> Option<u64> {
        let map = self.words(bus, property);
        if map.is_empty() {
            return Some(address);
        }
        let ((child, size), (parent, _)) = (self.cells(bus), self.cells(self.0[bus].parent?));
        map.chunks_exact(child + parent + size).find_map(|entry| {
            let (from, to) = (wide(&entry[..child]), wide(&entry[child..child + parent]));
            let length = wide(&entry[child + parent..]);
            let offset = address.checked_sub(from).filter(|&offset| offset < length)?;
            Some(to + offset)
        })
    }

    /// The first range of `reg`, for processors.
    fn place_of(&self, at: usize) -> Option<(u64, u64)> {
        let bus = self.0[at].parent?;
        let (address, size) = self.cells(bus);
        let reg = self.words(at, "reg");
        let (start, length) = (wide(reg.get(..address)?), wide(reg.get(address..address + size)?));
        let mut start = start;
        for bus in self.chain(bus) {
            if self.0[bus].parent.is_some() {
                self.get(bus, "ranges")?;
                start = self.up(bus, "ranges", start)?;
            }
        }
        Some((start, length))
    }

    /// Where DMA to `address` from a device on `bus` ends.
    fn dma(&self, bus: usize, address: u64) -> Option<u64> {
        let mut address = address;
        for bus in self.chain(bus) {
            if self.0[bus].parent.is_some() {
                address = self.up(bus, "dma-ranges", address)?;
            }
        }
        Some(address)
    }

    fn is_bridge(&self, at: usize) -> bool {
        matches!(self.get(at, "device_type"), Some(b"pci\0" | b"pciex\0"))
            || self.texts(at, "compatible").iter().any(|name| name == "pci-host-ecam-generic")
            || self.has(at, "bus-range") && self.word(at, "#address-cells", 2) == 3
    }

    fn hosts(&self) -> Vec<usize> {
        let host = |&at: &usize| self.is_bridge(at) && !self.chain(at).into_iter().skip(1).any(|at| self.is_bridge(at));
        (0..self.0.len()).filter(host).filter(|&at| self.enabled(at)).collect()
    }

    /// Who knows requester ID `rid` of a host, and as what.
    fn mapped(&self, host: usize, property: &str, rid: u32) -> Option<(usize, u32)> {
        let masked = rid & self.word(host, &format!("{property}-mask"), 0xffff) & 0xffff;
        let map = self.words(host, property);
        let hit = map.chunks_exact(4).find(|entry| masked >= entry[0] && masked - entry[0] < entry[3])?;
        let target = self.phandle(hit[1]).filter(|&target| self.enabled(target))?;
        Some((target, hit[2] + (masked - hit[0])))
    }

    /// The streams in `iommus`.
    fn streams(&self, at: usize) -> Vec<Value> {
        let (list, mut next, mut found) = (self.words(at, "iommus"), 0, Vec::new());
        while let Some(&phandle) = list.get(next) {
            let iommu = self.phandle(phandle).unwrap();
            let cells = self.word(iommu, "#iommu-cells", 1) as usize;
            if self.enabled(iommu) {
                let stream = if cells == 0 { 0 } else { list[next + 1] };
                found.push(json!([self.0[iommu].path, stream]));
            }
            next += 1 + cells;
        }
        found
    }
}

/// Compares what was said with what the second reader finds, and names the first difference.
fn compare(bytes: &[u8], said: &Value) -> Result<(), String> {
    let tree = Places::read(bytes);
    let same = |what: &str, said: &Value, found: Value| match *said == found {
        true => Ok(()),
        false => Err(format!("{what}: said {said}, found {found}")),
    };
    same("compatible", &said["compatible"], json!(tree.texts(0, "compatible")))?;
    same("memory", &said["memory"], memory(&tree))?;
    let smmus: Vec<Value> = (0..tree.0.len())
        .filter(|&at| tree.texts(at, "compatible").iter().any(|name| name == "arm,smmu-v3") && tree.enabled(at))
        .map(|at| {
            let (base, size) = tree.place_of(at).unzip();
            json!({
                "path": tree.0[at].path, "base": base, "size": size, "coherent": tree.coherent(at),
                "msi": tree.has(at, "msi-parent"), "interrupts": tree.texts(at, "interrupt-names"),
            })
        })
        .collect();
    same("smmus", &said["smmus"], json!(smmus))?;
    let masters: Vec<Value> = (0..tree.0.len())
        .filter(|&at| tree.has(at, "iommus") && tree.enabled(at) && !tree.0[at].path.starts_with("/__"))
        .map(|at| json!({"path": tree.0[at].path, "iommus": tree.streams(at), "coherent": tree.coherent(at)}))
        .collect();
    same("masters", &said["masters"], json!(masters))?;
    let paths: Vec<&Value> = said["pci"].as_array().unwrap().iter().map(|host| &host["path"]).collect();
    let hosts = tree.hosts();
    same("pci", &json!(paths), json!(hosts.iter().map(|&at| &tree.0[at].path).collect::<Vec<_>>()))?;
    for (said, &at) in said["pci"].as_array().unwrap().iter().zip(&hosts) {
        compare_host(&tree, at, said).map_err(|difference| format!("{}, {difference}", tree.0[at].path))?;
    }
    Ok(())
}

fn memory(tree: &Places) -> Value {
    let (address, size) = tree.cells(0);
    let nodes = (0..tree.0.len()).filter(|&at| tree.0[at].parent == Some(0) && tree.enabled(at));
    let reg = nodes.filter(|&at| tree.get(at, "device_type") == Some(b"memory\0")).flat_map(|at| {
        let reg = tree.words(at, "reg");
        reg.chunks_exact(address + size)
            .map(|entry| [wide(&entry[..address]), wide(&entry[address..])])
            .collect::<Vec<_>>()
    });
    json!(reg.filter(|&[_, size]| size != 0).collect::<Vec<_>>())
}

/// The rows of a map, one requester ID at a time.
fn expanded(rows: &Value, buses: (u32, u32)) -> BTreeMap<u32, (String, u32)> {
    let mut map = BTreeMap::new();
    for row in rows.as_array().unwrap() {
        let number = |at: usize| u32::try_from(row[at].as_u64().unwrap()).unwrap();
        for offset in 0..number(3) {
            let rid = number(0) + offset;
            if (buses.0..=buses.1).contains(&(rid >> 8)) {
                let before = map.insert(rid, (row[1].as_str().unwrap().to_string(), number(2) + offset));
                assert!(before.is_none(), "requester {rid:#x} is there twice");
            }
        }
    }
    map
}

fn compare_host(tree: &Places, at: usize, said: &Value) -> Result<(), String> {
    let buses = match tree.words(at, "bus-range").as_slice() {
        &[first, last] => (first, last),
        _ => (0, 255),
    };
    let ecam = tree.texts(at, "compatible").iter().any(|name| name == "pci-host-ecam-generic");
    let found = json!({
        "compatible": tree.texts(at, "compatible"), "bus_range": [buses.0, buses.1], "coherent": tree.coherent(at),
        "ecam": tree.place_of(at).filter(|_| ecam).map(|(base, size)| [base, size]),
    });
    for key in ["compatible", "bus_range", "coherent", "ecam"] {
        if said[key] != found[key] {
            return Err(format!("{key}: said {}, found {}", said[key], found[key]));
        }
    }
    for (key, property) in [("iommu_map", "iommu-map"), ("msi_map", "msi-map")] {
        let said = expanded(&said[key], buses);
        let parent = tree.words(at, "msi-parent").first().and_then(|&phandle| tree.phandle(phandle));
        for rid in buses.0 << 8..(buses.1 + 1) << 8 {
            let found = if property == "msi-map" && !tree.has(at, property) {
                parent.filter(|&target| tree.enabled(target)).map(|target| (target, rid))
            } else {
                tree.mapped(at, property, rid)
            };
            let found = found.map(|(target, number)| (tree.0[target].path.clone(), number));
            if said.get(&rid) != found.as_ref() {
                return Err(format!("{key}: requester {rid:#x}: said {:?}, found {found:?}", said.get(&rid)));
            }
        }
    }
    compare_dma(tree, at, &said["dma_ranges"])
}

/// Every end of every window said leads where the chain of buses leads, and no window of the tree is missing.
fn compare_dma(tree: &Places, at: usize, said: &Value) -> Result<(), String> {
    let windows: Vec<[u64; 3]> = serde_json::from_value(said.clone()).unwrap();
    for &[dma, cpu, size] in &windows {
        for offset in [0, size - 1] {
            let found = tree.dma(at, dma + offset);
            if found != Some(cpu.wrapping_add(offset)) {
                return Err(format!("DMA {:#x}: said {:#x}, found {found:x?}", dma + offset, cpu.wrapping_add(offset)));
            }
        }
    }
    // The first bus on the way up that says something bounds what there can be.
    let first = tree.chain(at).into_iter().find(|&bus| !tree.words(bus, "dma-ranges").is_empty());
    let Some(bus) = first.filter(|&bus| tree.0[bus].parent.is_some()) else {
        return if windows.is_empty() { Ok(()) } else { Err(format!("dma_ranges: said {said}, found none")) };
    };
    let ((child, size), (parent, _)) = (tree.cells(bus), tree.cells(tree.0[bus].parent.unwrap()));
    for entry in tree.words(bus, "dma-ranges").chunks_exact(child + parent + size) {
        let (start, length) = (wide(&entry[..child]), wide(&entry[child + parent..]));
        let inside = |address: u64| windows.iter().any(|&[dma, _, size]| address.wrapping_sub(dma) < size);
        for address in [start, start.wrapping_add(length / 2), start.wrapping_add(length).wrapping_sub(1)] {
            if length != 0 && inside(address) != tree.dma(at, address).is_some() {
                return Err(format!("DMA {address:#x}: said {}, found {:x?}", inside(address), tree.dma(at, address)));
            }
        }
    }
    Ok(())
}

// Trees.

/// All `.dtb` files below a folder.
fn below(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            below(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "dtb") {
            found.push(path);
        }
    }
}

#[test]
fn every_tree_is_read_as_a_second_reader_does() {
    let mut files = Vec::new();
    below(&workspace().join("kernel/tests/data"), &mut files);
    assert!(files.len() >= 5, "{files:?}");
    if let Some(folder) = std::env::var_os("SLUICE_DTBS") {
        below(Path::new(&folder), &mut files);
    }
    let mut wrong = Vec::new();
    for file in &files {
        if let Err(difference) = compare(&std::fs::read(file).unwrap(), &described(file)) {
            wrong.push(format!("{}: {difference}", file.display()));
        }
        let people = describe(&[], file);
        assert_eq!(people.code, Some(0), "{}: {}", file.display(), people.stderr);
    }
    assert!(wrong.is_empty(), "{} of {} trees:\n{}", wrong.len(), files.len(), wrong.join("\n"));
}

/// A node with these properties and children.
fn node(name: &str, properties: &[(&str, &[u8])], children: Vec<DeviceTreeNode>) -> DeviceTreeNode {
    let mut node = DeviceTreeNode::new_unchecked(name);
    for (name, value) in properties {
        node.add_property(DeviceTreeProperty::new_unchecked(*name, *value));
    }
    for child in children {
        node.add_child(child);
    }
    node
}

/// The bytes of a list of cells.
fn cells<const N: usize>(cells: [u32; N]) -> Vec<u8> {
    cells.iter().flat_map(|cell| cell.to_be_bytes()).collect()
}

const OFF: (&str, &[u8]) = ("status", b"disabled\0");
const PCI: (&str, &[u8]) = ("device_type", b"pci\0");

/// A number of cells for `#...-cells`.
const ZERO: &[u8] = &[0, 0, 0, 0];
const ONE: &[u8] = &[0, 0, 0, 1];
const TWO: &[u8] = &[0, 0, 0, 2];
const THREE: &[u8] = &[0, 0, 0, 3];

/// The interrupt controller, and IOMMUs with every number of cells, one of them disabled.
fn hard_controllers() -> Vec<DeviceTreeNode> {
    let iommu = |name, compatible: &[u8], handle: u32, cells_of: &[u8], reg: [u32; 2], more: &[(&str, &[u8])]| {
        let (handle, reg) = (cells([handle]), cells(reg));
        let own: [(&str, &[u8]); 4] =
            [("compatible", compatible), ("phandle", &handle), ("#iommu-cells", cells_of), ("reg", &reg)];
        node(name, &[&own, more].concat(), Vec::new())
    };
    let v3 = b"arm,smmu-v3\0";
    let messages = cells([0x10, 7]);
    let told: [(&str, &[u8]); 2] = [("msi-parent", &messages), ("interrupt-names", b"eventq\0gerror\0priq\0")];
    vec![
        iommu("iommu@1000", v3, 1, ONE, [0x1000, 0x2_0000], &told),
        iommu("iommu@30000", v3, 2, ONE, [0x3_0000, 0x2_0000], &[OFF]),
        iommu("iommu@50000", b"test,mmu-500\0arm,mmu-500\0", 3, TWO, [0x5_0000, 0x1000], &[]),
        // Its unit address is not where it is.
        iommu("iommu@beef", b"rockchip,iommu\0", 4, ZERO, [0x6_0000, 0x1000], &[]),
        node("msi@200000", &[("phandle", &cells([0x10])), ("#msi-cells", ONE), ("msi-controller", b"")], Vec::new()),
    ]
}

/// A tree with a device for every quirk.
fn hard_tree() -> Vec<u8> {
    let everywhere = cells([4, 3, 0x40, 0x7f, 2, 1, 1, 9]);
    let one = cells([1, 5]);
    let dma = node("dma@70000", &[("iommus", &everywhere), ("dma-noncoherent", b"")], Vec::new());
    let master = |name| node(name, &[("iommus", &one)], Vec::new());
    let bus = node("bus@80000", &[OFF], vec![master("dma@80000")]);
    let reserved = node("dma@90000", &[("iommus", &one), ("status", b"reserved\0")], Vec::new());
    let spelt = node("dma@a0000", &[("iommus", &one), ("status", b"ok\0")], Vec::new());
    // A host that masks, with two devices below it that are none; what it reaches passes two buses.
    let port = node("pcie@0,0", &[PCI, ("#address-cells", THREE), ("#size-cells", TWO)], vec![master("device@0,0")]);
    let host = node(
        "pcie@100000",
        &[
            PCI,
            ("compatible", b"test,pcie\0"),
            ("#address-cells", THREE),
            ("#size-cells", TWO),
            ("bus-range", &cells([0, 1])),
            ("iommu-map", &cells([0, 1, 0x100, 4, 4, 2, 0x200, 4])),
            ("iommu-map-mask", &cells([0x107])),
            ("msi-parent", &cells([0x10, 3])),
            ("dma-ranges", &cells([0x4300_0000, 0x10, 0, 0, 1, 0])),
        ],
        vec![port],
    );
    let mut devices = hard_controllers();
    devices.extend([dma, bus, reserved, spelt, host]);
    let soc = node(
        "soc",
        &[
            ("#address-cells", ONE),
            ("#size-cells", ONE),
            ("ranges", &cells([0, 1, 0, 0x4000_0000])),
            ("dma-ranges", &cells([0, 0, 0x8000_0000, 0x4000_0000, 0x4000_0000, 4, 0, 0x1000_0000])),
            ("dma-coherent", b""),
        ],
        devices,
    );
    // Entries of a map have four cells, whatever their target says of its own.
    let ecam = node(
        "pci@5000000",
        &[
            PCI,
            ("compatible", b"test,ecam\0pci-host-ecam-generic\0"),
            ("#address-cells", THREE),
            ("#size-cells", TWO),
            ("reg", &cells([0x40, 0, 0, 0x1000_0000])),
            ("iommu-map", &cells([0, 3, 0x10, 0x100, 0x100, 1, 0x1_0000, 0xff00])),
            ("msi-map", &cells([0, 0x10, 0x80, 0x1_0000])),
            ("dma-ranges", b""),
        ],
        Vec::new(),
    );
    let notes = node("__local_fixups__", &[], vec![node("dma@0", &[("iommus", ZERO)], Vec::new())]);
    let memory = |name, reg: &[u8], more: &[(&str, &[u8])]| {
        node(name, &[&[("device_type", b"memory\0".as_slice()), ("reg", reg)], more].concat(), Vec::new())
    };
    let mut tree = DeviceTree::new();
    tree.root = node(
        "",
        &[("#address-cells", TWO), ("#size-cells", TWO), ("compatible", b"test,hard\0test,board\0")],
        vec![
            memory("memory@80000000", &cells([0, 0x8000_0000, 0, 0x4000_0000, 9, 0, 1, 0]), &[]),
            memory("memory@0", &cells([0, 0, 0, 0]), &[]),
            memory("memory@c0000000", &cells([0, 0xc000_0000, 0, 0x1000]), &[OFF]),
            node("soc-parent", &[("#address-cells", TWO), ("#size-cells", TWO), ("ranges", b"")], vec![soc]),
            ecam,
            notes,
        ],
    );
    tree.to_dtb()
}

/// Writes a tree to a file of its own.
fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::Builder::new().suffix(".dtb").tempfile().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    file
}

#[test]
fn every_quirk_is_read_as_the_bindings_have_it() {
    let bytes = hard_tree();
    let file = file(&bytes);
    let said = described(file.path());
    let soc = |name: &str| format!("/soc-parent/soc/{name}");
    assert_eq!(said["compatible"], json!(["test,hard", "test,board"]));
    assert_eq!(said["memory"], json!([[0x8000_0000_u64, 0x4000_0000], [0x9_0000_0000_u64, 0x1_0000_0000_u64]]));
    let smmu = json!([{
        "path": soc("iommu@1000"), "base": 0x1_0000_1000_u64, "size": 0x2_0000, "coherent": true, "msi": true,
        "interrupts": ["eventq", "gerror", "priq"],
    }]);
    assert_eq!(said["smmus"], smmu);
    let host = &said["pci"][0];
    assert_eq!((&host["path"], &host["bus_range"]), (&json!(soc("pcie@100000")), &json!([0, 1])));
    assert_eq!((&host["ecam"], &host["coherent"]), (&Value::Null, &json!(true)));
    // The mask lets four functions of eight through to an SMMU that is on, again and again; bus 1 differs in a bit of the mask.
    let rows: Vec<Value> = (0..32).map(|slot| json!([8 * slot, soc("iommu@1000"), 0x100, 4])).collect();
    assert_eq!(host["iommu_map"], json!(rows));
    assert_eq!(host["msi_map"], json!([[0, soc("msi@200000"), 0, 0x1_0000]]));
    let windows = [[0x10_0000_0000_u64, 0x8000_0000, 0x4000_0000], [0x10_4000_0000, 0x4_0000_0000, 0x1000_0000]];
    assert_eq!(host["dma_ranges"], json!(windows));
    let host = &said["pci"][1];
    assert_eq!((&host["path"], &host["bus_range"]), (&json!("/pci@5000000"), &json!([0, 255])));
    assert_eq!((&host["ecam"], &host["coherent"]), (&json!([0x40_0000_0000_u64, 0x1000_0000]), &json!(false)));
    let rows = json!([[0, soc("iommu@50000"), 0x10, 0x100], [0x100, soc("iommu@1000"), 0x1_0000, 0xff00]]);
    assert_eq!(host["iommu_map"], rows);
    assert_eq!(host["msi_map"], json!([[0, soc("msi@200000"), 0x80, 0x1_0000]]));
    assert_eq!((&host["dma_ranges"], &said["pci"][2]), (&json!([]), &Value::Null));
    let masters = json!([
        {
            "path": soc("dma@70000"), "coherent": false,
            "iommus": [[soc("iommu@beef"), 0], [soc("iommu@50000"), 0x40], [soc("iommu@1000"), 9]],
        },
        {"path": soc("dma@a0000"), "coherent": true, "iommus": [[soc("iommu@1000"), 5]]},
        {"path": soc("pcie@100000/pcie@0,0/device@0,0"), "coherent": true, "iommus": [[soc("iommu@1000"), 5]]},
    ]);
    assert_eq!(said["masters"], masters);
    compare(&bytes, &said).unwrap();
}

#[test]
fn people_are_told_what_is_missing() {
    let file = file(&hard_tree());
    let ran = describe(&[], file.path());
    for line in [
        "board     test,hard, test,board",
        "memory    0x80000000, 1 GiB",
        "smmu      /soc-parent/soc/iommu@1000 SMMUv3, enabled",
        "          0x100001000, 128 KiB, coherent, can send messages",
        "          interrupts eventq, gerror, priq",
        "smmu      /soc-parent/soc/iommu@30000 SMMUv3, disabled",
        "iommu     /soc-parent/soc/iommu@beef rockchip,iommu",
        "          buses 0x00 to 0x01, no ECAM, coherent",
        "          requester 0x0 to 0x3: stream 0x100 to 0x103 of /soc-parent/soc/iommu@1000",
        "          ... and 24 more",
        "          DMA 0x1000000000 is 0x80000000, 1 GiB",
        "          stream 0x40, whatever the bits 0x7f, of /soc-parent/soc/iommu@50000",
        "missing   a driver for the IOMMU rockchip,iommu",
        "missing   a driver for the PCIe host test,pcie",
        "missing   a driver for the MSI controller /soc-parent/soc/msi@200000",
        "missing   an interrupt controller that is known (GICv2, GICv3)",
    ] {
        assert!(ran.stdout.lines().any(|own| own == line), "no line {line:?} in\n{}", ran.stdout);
    }
}

#[test]
fn what_is_no_tree_is_refused_in_one_sentence() {
    let tree = std::fs::read(workspace().join("kernel/tests/data/qemu-10.0-virt.dtb")).unwrap();
    let mut broken = tree.clone();
    let structure = words(&tree[8..12])[0] as usize;
    broken[structure + 3] = 0x7f;
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes, fault) in [
        ("empty", &[][..], "only 0 bytes"),
        ("text", b"/dts-v1/; / { compatible = \"source, not a blob\"; };", "magic number"),
        ("header", &tree[..40], "total size"),
        ("half", &tree[..tree.len() / 2], "total size"),
        ("token", &broken, "token"),
    ] {
        let file = folder.path().join(name);
        std::fs::write(&file, bytes).unwrap();
        for arguments in [&[][..], &["--json"]] {
            let ran = describe(arguments, &file);
            assert_eq!(ran.code, Some(2), "{name}: {ran:?}");
            assert!(ran.stdout.is_empty(), "{name}: {ran:?}");
            assert!(ran.stderr.contains(fault) && ran.stderr.contains(name), "{name}: {ran:?}");
            assert_eq!(ran.stderr.lines().count(), 1, "{name}: {ran:?}");
        }
    }
    for (file, fault) in [(folder.path().join("nothing"), "No such file"), (folder.path().to_path_buf(), "directory")] {
        let ran = describe(&[], &file);
        assert_eq!((ran.code, ran.stderr.lines().count()), (Some(2), 1), "{ran:?}");
        assert!(ran.stderr.contains(fault), "{ran:?}");
    }
}

#[test]
fn help_says_what_is_printed_and_how_it_ends() {
    let ran = describe(&["--help"], Path::new(""));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    for word in ["FILE.dtb", "--json", "Exit codes", "Examples", "missing"] {
        assert!(ran.stdout.contains(word), "no {word}:\n{}", ran.stdout);
    }
}
