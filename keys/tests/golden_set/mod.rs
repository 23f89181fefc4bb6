//! Golden sets: what a released version wrote, and every later version has to read, and to read alike.
//!
//! A set is a file `tests/golden/VERSION/NAME.golden`. It has blocks, with an empty line between them:
//!
//! ```text
//! name: what it is
//!   its bytes in hexadecimal, 32 in a line; or, where it is text,
//!   = the text
//! ```
//!
//! The test makes the same values anew and compares: what is in the set is read as that value, and the present
//! version still writes what is in its own set. Values are compared by what the present version writes for them, which
//! leaves nothing out; so no two fields of a value should have the same contents.
#![allow(
    dead_code,
    clippy::disallowed_methods,
    reason = "each test that includes this uses a part of it; sets are files"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Set to anything, it adds to the sets of the present version what is not there yet. It never changes what is there.
const WRITE: &str = "HAUBERK_WRITE_GOLDEN";

/// Reads an entry as the present version does, and writes what was read.
type Reread = Box<dyn Fn(&[u8]) -> Result<Vec<u8>, String>>;

/// One thing of a golden set.
pub(crate) struct Entry {
    name: String,
    what: String,
    written: Vec<u8>,
    text: bool,
    /// Whether the present version would write it again, byte for byte.
    repeatable: bool,
    reread: Reread,
}

impl Entry {
    /// Bytes: `written` is what the present version writes for the value.
    pub(crate) fn bytes(
        name: impl Into<String>,
        what: impl Into<String>,
        written: Vec<u8>,
        reread: impl Fn(&[u8]) -> Result<Vec<u8>, String> + 'static,
    ) -> Self {
        let (name, what, reread) = (name.into(), what.into(), Box::new(reread));
        Self { name, what, written, text: false, repeatable: true, reread }
    }

    /// One line of text.
    pub(crate) fn text(
        name: impl Into<String>,
        what: impl Into<String>,
        written: &str,
        reread: impl Fn(&str) -> Result<String, String> + 'static,
    ) -> Self {
        let reread = move |bytes: &[u8]| {
            let text = std::str::from_utf8(bytes).map_err(|error| error.to_string())?;
            Ok(reread(text)?.trim_end().as_bytes().to_vec())
        };
        Self { text: true, ..Self::bytes(name, what, written.trim_end().as_bytes().to_vec(), reread) }
    }

    /// What depends on randomness that a library draws in its own way: what is in the set was written once, and is
    /// only read.
    #[must_use]
    pub(crate) fn written_once(self) -> Self {
        Self { repeatable: false, ..self }
    }
}

/// Makes the entries of a set.
pub(crate) type Make = fn() -> Vec<Entry>;

/// Which versions a set is of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Era {
    /// The present version writes it.
    Present,
    /// Earlier versions wrote it; the entries of the test say what it is read as.
    Past,
}

/// Compares a set, such as `v3/messages`, below the crate's directory `home` with the entries that the test makes.
pub(crate) fn check(home: &str, set: &str, era: Era, entries: &[Entry]) {
    let path = path(home, set);
    let mut found = read(&path);
    let mut problems = Vec::new();
    let names: BTreeSet<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    assert_eq!(names.len(), entries.len(), "{set}: two entries have the same name");

    if era == Era::Present && std::env::var_os(WRITE).is_some() {
        for entry in entries {
            found.entry(entry.name.clone()).or_insert_with(|| (entry.what.clone(), entry.written.clone()));
        }
        write(&path, entries, &found);
    }
    for name in found.keys().filter(|name| !names.contains(name.as_str())) {
        problems
            .push(format!("{name} is in the set, but not in the test: what was released is read for ever"));
    }
    for entry in entries {
        let name = &entry.name;
        let Some((_, golden)) = found.get(name) else {
            problems.push(format!("{name} is not in the set: {WRITE}=1 adds it"));
            continue;
        };
        if era == Era::Present && entry.repeatable && *golden != entry.written {
            problems.push(format!(
                "{name} is written in another way than before:\n  before {}\n  now    {}",
                shown(golden, entry.text),
                shown(&entry.written, entry.text)
            ));
        }
        let expected = if entry.repeatable { &entry.written } else { golden };
        match (entry.reread)(golden) {
            Ok(again) if again == *expected => {}
            Ok(again) => problems.push(format!(
                "{name} is read as something else:\n  expected {}\n  found    {}",
                shown(expected, entry.text),
                shown(&again, entry.text)
            )),
            Err(error) => problems.push(format!("{name} is not read any more: {error}")),
        }
    }
    assert!(
        problems.is_empty(),
        "{}:\n\n{}\n\nFormats in released versions never change; add a new version directory. \
         CONTRIBUTING.md, \"Formats\", says how they may grow.",
        path.display(),
        problems.join("\n\n")
    );
}

/// The sets that there are below the crate's directory, such as `v3/messages`.
pub(crate) fn sets(home: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for version in std::fs::read_dir(root(home)).expect("there are golden sets").flatten() {
        for file in std::fs::read_dir(version.path()).expect("a version is a directory").flatten() {
            let (version, file) = (version.file_name(), file.file_name());
            let (version, file) = (version.to_string_lossy(), file.to_string_lossy());
            let name = file.strip_suffix(".golden").expect("only golden sets are there");
            found.insert(format!("{version}/{name}"));
        }
    }
    found
}

/// The contents of one entry.
pub(crate) fn entry(home: &str, set: &str, name: &str) -> Vec<u8> {
    let (_, bytes) = read(&path(home, set)).remove(name).expect("the entry is there");
    bytes
}

/// Every variant has an entry.
pub(crate) fn assert_complete(all: &[&str], given: impl IntoIterator<Item = &'static str>) {
    let given: BTreeSet<&str> = given.into_iter().collect();
    let missing: Vec<_> = all.iter().filter(|name| !given.contains(**name)).collect();
    assert!(missing.is_empty(), "variants without an entry: {missing:?}");
}

/// Names the variants of an enum, and lists the names: a variant that is added does not compile before it has one, and
/// [`assert_complete`] wants an entry for each.
macro_rules! variants {
    ($name:ident, $all:ident: $type:ty { $($pattern:pat => $text:literal),+ $(,)? }) => {
        fn $name(value: &$type) -> &'static str {
            match value { $($pattern => $text),+ }
        }
        const $all: &[&str] = &[$($text),+];
    };
}
pub(crate) use variants;

fn root(home: &str) -> PathBuf {
    Path::new(home).join("tests/golden")
}

fn path(home: &str, set: &str) -> PathBuf {
    root(home).join(format!("{set}.golden"))
}

/// Names, descriptions and contents.
fn read(path: &Path) -> BTreeMap<String, (String, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return found,
        Err(error) => panic!("{}: {error}", path.display()),
    };
    for block in text.split("\n\n").map(str::trim_end).filter(|block| !block.is_empty()) {
        let (head, body) = block.split_once('\n').unwrap_or((block, ""));
        let (name, what) =
            head.split_once(": ").unwrap_or_else(|| panic!("no name and description: {head:?}"));
        let bytes = match body.trim().strip_prefix("= ") {
            Some(text) => text.as_bytes().to_vec(),
            None => hex::decode(body.split_whitespace().collect::<String>())
                .unwrap_or_else(|error| panic!("{name}: {error}")),
        };
        let double = found.insert(name.to_owned(), (what.to_owned(), bytes)).is_some();
        assert!(!double, "{name} is there twice");
    }
    found
}

fn write(path: &Path, entries: &[Entry], found: &BTreeMap<String, (String, Vec<u8>)>) {
    let mut text = String::new();
    let mut add = |name: &str, as_text: bool| {
        let (what, bytes) = &found[name];
        let gap = if text.is_empty() { "" } else { "\n" };
        write!(text, "{gap}{name}: {what}\n{}\n", block(bytes, as_text)).expect("strings grow");
    };
    for entry in entries {
        add(&entry.name, entry.text);
    }
    // What the test does not know is not thrown away either.
    for name in found.keys().filter(|name| !entries.iter().any(|entry| entry.name == **name)) {
        add(name, false);
    }
    std::fs::create_dir_all(path.parent().expect("it is in a directory")).expect("the set can be written");
    std::fs::write(path, text).expect("the set can be written");
}

fn block(bytes: &[u8], as_text: bool) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if as_text => format!("  = {text}"),
        _ => bytes.chunks(32).map(|line| format!("  {}", hex::encode(line))).collect::<Vec<_>>().join("\n"),
    }
}

fn shown(bytes: &[u8], as_text: bool) -> String {
    if as_text { String::from_utf8_lossy(bytes).into_owned() } else { hex::encode(bytes) }
}
