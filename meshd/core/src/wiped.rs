//! Serialisation of what may hold secrets: no copy of them is left behind in memory.

use serde::Serialize;
use zeroize::Zeroizing;

/// The postcard encoding of `value`, or nothing if it cannot be expressed.
///
/// Written into a buffer of the right length: one that grows leaves pieces of itself behind when it moves.
pub(crate) fn encode(value: &impl Serialize) -> Zeroizing<Vec<u8>> {
    let length = postcard::experimental::serialized_size(value).unwrap_or_default();
    let mut bytes = Zeroizing::new(vec![0; length]);
    if postcard::to_slice(value, &mut bytes).is_err() {
        bytes.clear();
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_encoding_is_that_of_postcard_and_its_buffer_has_never_grown() {
        let value = (7u64, "text", vec![1u8; 300]);
        let bytes = encode(&value);
        assert_eq!(*bytes, postcard::to_allocvec(&value).unwrap());
        assert_eq!(bytes.capacity(), bytes.len());
    }

    #[test]
    fn what_cannot_be_expressed_gives_nothing() {
        struct Endless;
        impl Serialize for Endless {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_seq([1u8, 2].iter().filter(|_| true))
            }
        }
        assert!(encode(&Endless).is_empty());
    }
}
