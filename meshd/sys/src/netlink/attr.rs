//! Netlink attributes: a writer that cannot produce a wrong length, a reader that cannot be made to
//! read past the end.

/// Nested attribute (`NLA_F_NESTED`).
const NESTED: u16 = 0x8000;
/// Payload in network byte order (`NLA_F_NET_BYTEORDER`); a mere flag, masked off when reading.
const TYPE_MASK: u16 = 0x3fff;

/// The body of one message: a fixed header and attributes behind it.
///
/// An attribute that would be longer than its 16-bit length field can say is remembered, and the
/// message refuses to be sent.
#[derive(Debug, Clone, Default)]
pub(crate) struct Body {
    bytes: Vec<u8>,
    too_long: bool,
}

impl Body {
    /// Starts with a fixed header; its length must be a multiple of four.
    pub(crate) fn new(header: &[u8]) -> Self {
        debug_assert_eq!(header.len() % 4, 0);
        Self { bytes: header.to_vec(), too_long: false }
    }

    pub(crate) fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let Ok(len) = u16::try_from(value.len() + 4) else {
            self.too_long = true;
            return self;
        };
        self.bytes.extend_from_slice(&len.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
        self
    }

    pub(crate) fn u8(&mut self, kind: u16, value: u8) -> &mut Self {
        self.bytes(kind, &[value])
    }

    pub(crate) fn u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    pub(crate) fn be16(&mut self, kind: u16, value: u16) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub(crate) fn be32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub(crate) fn be64(&mut self, kind: u16, value: u64) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// A string with its terminating zero.
    pub(crate) fn str(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = Vec::with_capacity(value.len() + 1);
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    /// An attribute made of attributes.
    pub(crate) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        fill(self);
        match u16::try_from(self.bytes.len() - start) {
            Ok(len) => {
                self.bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes());
                self.bytes[start + 2..start + 4].copy_from_slice(&(kind | NESTED).to_ne_bytes());
            }
            Err(_) => self.too_long = true,
        }
        self
    }

    /// Raw bytes inside a nest, such as the `ifinfomsg` of a veth's peer.
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self.pad();
        self
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The finished bytes, or `None` when an attribute was too long for its length field.
    pub(crate) fn finish(&self) -> Option<&[u8]> {
        (!self.too_long).then_some(&self.bytes)
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }
}

/// Walks over attributes. Stops at the first one whose length makes no sense.
#[derive(Debug, Clone)]
pub(crate) struct Attrs<'a>(&'a [u8]);

impl<'a> Attrs<'a> {
    /// The attributes behind a fixed header of `header` bytes.
    pub(crate) fn after(bytes: &'a [u8], header: usize) -> Self {
        Self(bytes.get(header..).unwrap_or_default())
    }

    /// The first attribute of this kind.
    pub(crate) fn find(&self, kind: u16) -> Option<Attr<'a>> {
        self.clone().find_map(|(k, value)| (k == kind).then_some(value))
    }
}

impl<'a> Iterator for Attrs<'a> {
    type Item = (u16, Attr<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let [l0, l1, k0, k1, ..] = *self.0 else { return None };
        let len = usize::from(u16::from_ne_bytes([l0, l1]));
        let kind = u16::from_ne_bytes([k0, k1]) & TYPE_MASK;
        let value = self.0.get(4..len)?;
        self.0 = self.0.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, Attr(value)))
    }
}

/// One attribute's payload.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attr<'a>(pub(crate) &'a [u8]);

impl<'a> Attr<'a> {
    pub(crate) fn u8(self) -> Option<u8> {
        self.0.first().copied()
    }

    pub(crate) fn u32(self) -> Option<u32> {
        Some(u32::from_ne_bytes(*self.0.first_chunk()?))
    }

    pub(crate) fn i32(self) -> Option<i32> {
        Some(i32::from_ne_bytes(*self.0.first_chunk()?))
    }

    pub(crate) fn be32(self) -> Option<u32> {
        Some(u32::from_be_bytes(*self.0.first_chunk()?))
    }

    pub(crate) fn be64(self) -> Option<u64> {
        Some(u64::from_be_bytes(*self.0.first_chunk()?))
    }

    pub(crate) fn string(self) -> String {
        let end = self.0.iter().position(|b| *b == 0).unwrap_or(self.0.len());
        String::from_utf8_lossy(&self.0[..end]).into_owned()
    }

    pub(crate) fn nested(self) -> Attrs<'a> {
        Attrs(self.0)
    }

    /// An IPv4 or IPv6 address, told apart by its length.
    pub(crate) fn ip(self) -> Option<std::net::IpAddr> {
        if let Ok(four) = <[u8; 4]>::try_from(self.0) {
            return Some(four.into());
        }
        <[u8; 16]>::try_from(self.0).ok().map(Into::into)
    }

    pub(crate) fn mac(self) -> Option<[u8; 6]> {
        self.0.try_into().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut body = Body::new(&[1, 2, 3, 4]);
        body.u8(1, 7).str(2, "eth0").nest(3, |b| {
            b.be32(1, 0x0102_0304).u32(2, 9);
        });
        let bytes = body.finish().unwrap();
        let attrs = Attrs::after(bytes, 4);
        assert_eq!(attrs.find(1).unwrap().u8(), Some(7));
        assert_eq!(attrs.find(2).unwrap().string(), "eth0");
        let inner = attrs.find(3).unwrap().nested();
        assert_eq!(inner.find(1).unwrap().be32(), Some(0x0102_0304));
        assert_eq!(inner.find(2).unwrap().u32(), Some(9));
        assert!(attrs.find(4).is_none());
    }

    #[test]
    fn an_attribute_that_is_too_long_is_refused_not_cut() {
        assert!(Body::new(&[]).bytes(1, &vec![0; 65532]).finish().is_none());
        assert!(Body::new(&[]).bytes(1, &vec![0; 65531]).finish().is_some());
        let mut body = Body::new(&[]);
        body.nest(1, |b| {
            for _ in 0..2000 {
                b.bytes(1, &[0; 32]);
            }
        });
        assert!(body.finish().is_none());
    }

    proptest! {
        #[test]
        fn any_bytes_end_without_panic(bytes: Vec<u8>) {
            for (_, attr) in Attrs::after(&bytes, 0) {
                let _ = (attr.u8(), attr.u32(), attr.be64(), attr.string(), attr.ip(), attr.mac());
                prop_assert!(attr.nested().count() <= bytes.len());
            }
        }
    }
}
