//! Just enough of Rust's lexical rules to look for a word in code and not in comments or strings.

/// The source with comments and the contents of strings and character literals replaced by spaces; every line
/// stays on its line.
pub(crate) fn code_only(source: &str) -> String {
    let mut rest = source;
    let mut code = String::with_capacity(source.len());
    while let Some(first) = rest.chars().next() {
        let (skipped, kept) = match first {
            '/' if rest.starts_with("//") => (rest.find('\n').unwrap_or(rest.len()), 0),
            '/' if rest.starts_with("/*") => (block_comment(rest), 0),
            '"' => (quoted(rest, 1), 0),
            'r' | 'b' | 'c' => match literal_prefix(rest) {
                Some(literal) => (literal, 0),
                None => (0, word(rest)),
            },
            '\'' => (character(rest), 1),
            first if first.is_alphanumeric() || first == '_' => (0, word(rest)),
            first => (0, first.len_utf8()),
        };
        if skipped > 0 {
            code.extend(rest[..skipped].chars().map(|char| if char == '\n' { '\n' } else { ' ' }));
            rest = &rest[skipped..];
        } else {
            let kept = kept.max(first.len_utf8());
            code.push_str(&rest[..kept]);
            rest = &rest[kept..];
        }
    }
    code
}

/// The lines (from 1) of `code` that have `word` as a word of its own.
pub(crate) fn lines_with_word(code: &str, word: &str) -> Vec<usize> {
    let has = |line: &str| {
        line.split(|char: char| !char.is_alphanumeric() && char != '_').any(|found| found == word)
    };
    code.lines().enumerate().filter(|(_, line)| has(line)).map(|(index, _)| index + 1).collect()
}

fn word(rest: &str) -> usize {
    rest.find(|char: char| !char.is_alphanumeric() && char != '_').unwrap_or(rest.len())
}

/// Length of a block comment; they nest.
fn block_comment(rest: &str) -> usize {
    let mut depth = 0usize;
    let mut at = 0;
    while at < rest.len() {
        let here = &rest[at..];
        if here.starts_with("/*") {
            depth += 1;
            at += 2;
        } else if here.starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += here.chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

/// Length of a quoted string whose opening quote ends at `start`.
fn quoted(rest: &str, start: usize) -> usize {
    let mut escaped = false;
    for (index, char) in rest[start..].char_indices() {
        match char {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return start + index + 1,
            _ => {}
        }
    }
    rest.len()
}

/// Length of a literal that starts with one of `r b c br cr` and quotes, if that is what this is.
fn literal_prefix(rest: &str) -> Option<usize> {
    let prefix = rest.len() - rest.trim_start_matches(['r', 'b', 'c']).len();
    let (letters, after) = rest.split_at(prefix);
    match letters {
        "b" if after.starts_with('\'') => Some(prefix + character(after).max(1)),
        "b" | "c" if after.starts_with('"') => Some(quoted(rest, prefix + 1)),
        "r" | "br" | "cr" => {
            let hashes = after.len() - after.trim_start_matches('#').len();
            let body = after[hashes..].strip_prefix('"')?;
            let end = format!("\"{}", "#".repeat(hashes));
            let length = body.find(&end).map_or(body.len(), |found| found + end.len());
            Some(prefix + hashes + 1 + length)
        }
        _ => None,
    }
}

/// Length of a character literal, or 0 when the quote begins a lifetime.
fn character(rest: &str) -> usize {
    let mut chars = rest.char_indices().skip(1);
    match chars.next() {
        Some((_, '\\')) => {
            // The character after the backslash may be a quote itself.
            let found = chars.skip(1).find(|&(_, char)| char == '\'');
            found.map_or(rest.len(), |(index, _)| index + 1)
        }
        Some(_) => match chars.next() {
            Some((index, '\'')) => index + 1,
            _ => 0,
        },
        None => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn finds(source: &str, expected: &[usize]) {
        assert_eq!(lines_with_word(&code_only(source), "unsafe"), expected, "{source}");
    }

    #[test]
    fn the_word_is_found_in_code() {
        finds("fn a() {\n    unsafe { b() }\n}\nunsafe impl X for Y {}", &[2, 4]);
        finds("let x = 'a'; unsafe {}", &[1]);
        finds("fn f<'a>(x: &'a str) { unsafe {} }", &[1]);
        finds(r#"let x = b"x"; let y = r"\"; unsafe {}"#, &[1]);
        finds(r##"let x = r#"a"b"#; unsafe {}"##, &[1]);
        finds(r"let x = ['\'', '\\', '\u{1F}', b'\'']; unsafe {}", &[1]);
        finds("/* a /* b */ */ unsafe {}", &[1]);
        finds("let break_even = crab; unsafe {}", &[1]);
    }

    #[test]
    fn the_word_is_not_found_elsewhere() {
        finds("// unsafe\n/// unsafe\n//! unsafe", &[]);
        finds("/* unsafe\n unsafe /* unsafe */ unsafe */", &[]);
        finds(r#"let x = "unsafe \" unsafe"; let y = b"unsafe";"#, &[]);
        finds(r##"let x = r#"unsafe " unsafe"#;"##, &[]);
        finds("#![forbid(unsafe_code)]\nlet not_unsafe = 1;", &[]);
    }

    #[test]
    fn lines_stay_where_they_are() {
        let source = "a\n/* x\ny */ b\n\"s\nt\" c\n";
        assert_eq!(code_only(source).lines().count(), source.lines().count());
    }
}
