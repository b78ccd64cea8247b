//! The kernel command line: `key=value` words from `/chosen`'s `bootargs`.
//!
//! Words are separated by white space; white space inside double quotes separates nothing. In a value, `%` and two hexadecimal
//! digits stand for a byte (`%20` is a space), so that whatever passes the line on need not know about quotes. A word
//! without `=` is a key with an empty value. Where a key is given several times, the last counts, so that appending overrides.

#![forbid(unsafe_code)]

use alloc::{string::String, vec::Vec};

/// What is wrong with a command line. Every message names the key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A word that begins with `=`.
    #[error("command line: a value without a key: \"={0}\"")]
    NoKey(String),
    /// A double quote without a second one.
    #[error("command line: {0}: a quote is not closed")]
    Quote(String),
    /// A `%` without two hexadecimal digits after it, or bytes that are not UTF-8.
    #[error("command line: {0}: \"%\" needs two hexadecimal digits, and the bytes have to be UTF-8")]
    Percent(String),
    /// Not a number, or too large.
    #[error("command line: {key}: \"{value}\" is not a number from 0 to {max}")]
    Number {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// The largest number that would do.
        max: u64,
    },
    /// Not one of the words that the key takes.
    #[error("command line: {key}: \"{value}\" is not one of: {}", .choices.join(", "))]
    Choice {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What it takes.
        choices: &'static [&'static str],
    },
    /// The heap has no room.
    #[error("command line: no heap left")]
    OutOfMemory,
}

/// A parsed command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine {
    words: Vec<(String, String)>,
}

impl CommandLine {
    /// Parses a command line.
    ///
    /// # Errors
    ///
    /// The first word that cannot be understood.
    pub fn parse(line: &str) -> Result<Self, Error> {
        let mut words = Vec::new();
        let mut rest = line.trim_start();
        while !rest.is_empty() {
            let mut quoted = false;
            let end = rest.find(|letter: char| {
                quoted ^= letter == '"';
                !quoted && letter.is_whitespace()
            });
            let (word, tail) = rest.split_at(end.unwrap_or(rest.len()));
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            if end.is_none() && quoted {
                return Err(Error::Quote(owned(key)?));
            }
            if key.is_empty() {
                return Err(Error::NoKey(owned(value)?));
            }
            let key = without_quotes(key)?;
            let value = decode(&key, value)?;
            words.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
            words.push((key, value));
            rest = tail.trim_start();
        }
        Ok(Self { words })
    }

    /// Gives a key's value; `None` if the key is not there.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.all(key).last()
    }

    /// Gives all values of a key, in the order given.
    pub fn all<'a>(&'a self, key: &str) -> impl Iterator<Item = &'a str> {
        self.words.iter().filter(move |(own, _)| own == key).map(|(_, value)| value.as_str())
    }

    /// Reads a key's value as a number from 0 to `max`: decimal, or hexadecimal after `0x`, with `K`, `M` or `G` for powers
    /// of 1024.
    ///
    /// # Errors
    ///
    /// If the key is there and its value is something else.
    pub fn number(&self, key: &str, max: u64) -> Result<Option<u64>, Error> {
        let Some(value) = self.text(key) else { return Ok(None) };
        match number(value).filter(|&number| number <= max) {
            Some(number) => Ok(Some(number)),
            None => Err(Error::Number { key: owned(key)?, value: owned(value)?, max }),
        }
    }

    /// Reads a key's value as one of `choices`, and says which.
    ///
    /// # Errors
    ///
    /// If the key is there and its value is something else.
    pub fn choice(&self, key: &str, choices: &'static [&'static str]) -> Result<Option<usize>, Error> {
        let Some(value) = self.text(key) else { return Ok(None) };
        match choices.iter().position(|&choice| choice == value) {
            Some(index) => Ok(Some(index)),
            None => Err(Error::Choice { key: owned(key)?, value: owned(value)?, choices }),
        }
    }

    /// Reads a switch: absent is off; alone or with `on`, `yes`, `true` or `1` is on; `off`, `no`, `false` or `0` is off.
    ///
    /// # Errors
    ///
    /// If the value is something else.
    pub fn flag(&self, key: &str) -> Result<bool, Error> {
        const WORDS: &[&str] = &["", "on", "yes", "true", "1", "off", "no", "false", "0"];
        Ok(self.choice(key, WORDS)?.is_some_and(|index| index < 5))
    }

    /// Gives the keys that are not in `known`, in the order given, each once.
    pub fn unknown<'a>(&'a self, known: &[&str]) -> impl Iterator<Item = &'a str> {
        self.words.iter().enumerate().filter_map(move |(index, (key, _))| {
            let earlier = self.words.iter().take(index).any(|(other, _)| other == key);
            (!earlier && !known.contains(&key.as_str())).then_some(key.as_str())
        })
    }
}

fn owned(text: &str) -> Result<String, Error> {
    let mut copy = String::new();
    copy.try_reserve_exact(text.len()).map_err(|_| Error::OutOfMemory)?;
    copy.push_str(text);
    Ok(copy)
}

fn without_quotes(text: &str) -> Result<String, Error> {
    let mut copy = owned(text)?;
    copy.retain(|letter| letter != '"');
    Ok(copy)
}

/// Takes quotes away, and replaces `%` and two digits by the byte they stand for.
fn decode(key: &str, value: &str) -> Result<String, Error> {
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(value.len()).map_err(|_| Error::OutOfMemory)?;
    let mut rest = value.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        match byte {
            b'"' => {}
            b'%' => {
                let digits = tail.split_first_chunk::<2>().and_then(|(digits, tail)| {
                    let digit = |letter: u8| char::from(letter).to_digit(16);
                    let [high, low] = digits.map(digit);
                    Some((u8::try_from(high? << 4 | low?).ok()?, tail))
                });
                let Some((decoded, tail)) = digits else { return Err(Error::Percent(owned(key)?)) };
                bytes.push(decoded);
                rest = tail;
            }
            _ => bytes.push(byte),
        }
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(_) => Err(Error::Percent(owned(key)?)),
    }
}

fn number(text: &str) -> Option<u64> {
    let (digits, unit) = match text.as_bytes().last()? {
        b'K' | b'k' => (text.get(..text.len() - 1)?, 1 << 10),
        b'M' | b'm' => (text.get(..text.len() - 1)?, 1 << 20),
        b'G' | b'g' => (text.get(..text.len() - 1)?, 1 << 30),
        _ => (text, 1),
    };
    let (digits, radix) = digits.strip_prefix("0x").map_or((digits, 10), |digits| (digits, 16));
    // `from_str_radix` would take a sign.
    if !digits.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return None;
    }
    u64::from_str_radix(digits, radix).ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn parse(line: &str) -> CommandLine {
        CommandLine::parse(line).unwrap()
    }

    #[test]
    fn words_become_keys_and_values() {
        let line = parse("  picture=/a/b.bmp\tquiet  smp=4\n\"two words\"=x ");
        assert_eq!(line.text("picture"), Some("/a/b.bmp"));
        assert_eq!(line.text("quiet"), Some(""));
        assert_eq!(line.number("smp", 8), Ok(Some(4)));
        assert_eq!(line.text("two words"), Some("x"));
        assert_eq!(line.text("absent"), None);
        assert_eq!(parse("").words, vec![]);
    }

    #[test]
    fn spaces_come_in_quotes_or_as_percent_20() {
        assert_eq!(parse("p=\"a b\" q=1").text("p"), Some("a b"));
        assert_eq!(parse("\"p=a b\" q=1").text("p"), Some("a b"));
        assert_eq!(parse("p=a%20b%25%22").text("p"), Some("a b%\""));
        assert_eq!(parse("p=%c3%a9=").text("p"), Some("é="));
    }

    #[test]
    fn what_cannot_be_decoded_names_its_key() {
        for bad in ["p=%", "p=%2", "p=%2g", "p=%ff", "p=%+1"] {
            assert_eq!(CommandLine::parse(bad), Err(Error::Percent("p".into())), "{bad}");
        }
        assert_eq!(CommandLine::parse("a=1 p=\"x y"), Err(Error::Quote("p".into())));
        assert_eq!(CommandLine::parse("a=1 =5"), Err(Error::NoKey("5".into())));
    }

    #[test]
    fn numbers_have_bases_units_and_limits() {
        let line = parse("a=0x10 b=2M c=-1 d=18446744073709551616 e=17G f= g=+5 h=0x h2=K i=99");
        assert_eq!(line.number("a", 16), Ok(Some(16)));
        assert_eq!(line.number("b", u64::MAX), Ok(Some(2 << 20)));
        for key in ["c", "d", "f", "g", "h", "h2"] {
            let error = line.number(key, u64::MAX).unwrap_err();
            assert!(error.to_string().contains(key), "{error}");
        }
        assert_eq!(line.number("e", u64::MAX), Ok(Some(17 << 30)));
        let expected = Error::Number { key: "i".into(), value: "99".into(), max: 98 };
        assert_eq!(line.number("i", 98), Err(expected));
    }

    #[test]
    fn choices_and_flags_refuse_other_words() {
        let line = parse("iommu.off=allow quiet verbose=off shout=maybe");
        assert_eq!(line.choice("iommu.off", &["deny", "allow"]), Ok(Some(1)));
        assert_eq!(line.choice("absent", &["deny"]), Ok(None));
        assert_eq!((line.flag("quiet"), line.flag("verbose"), line.flag("absent")), (Ok(true), Ok(false), Ok(false)));
        assert!(line.flag("shout").unwrap_err().to_string().contains("shout"));
    }

    #[test]
    fn the_last_of_a_key_counts_and_unknown_keys_are_listed_once() {
        let line = parse("a=1 b=2 a=3 c=4 c=5");
        assert_eq!(line.text("a"), Some("3"));
        assert_eq!(line.all("a").collect::<Vec<_>>(), ["1", "3"]);
        assert_eq!(line.unknown(&["a"]).collect::<Vec<_>>(), ["b", "c"]);
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(line in "\\PC*", odd in "[ \"%=a0-9]{0,40}") {
            let _ = CommandLine::parse(&line);
            let _ = CommandLine::parse(&odd);
        }

        #[test]
        fn what_was_encoded_comes_back(value in "\\PC*") {
            let encoded: String = value.bytes().map(|byte| alloc::format!("%{byte:02x}")).collect();
            let line = CommandLine::parse(&alloc::format!("x=1 key={encoded} y=2")).unwrap();
            proptest::prop_assert_eq!(line.text("key"), Some(value.as_str()));
        }
    }
}
