//! Tokens: a way to join that ends by itself, and that members need not keep secret among themselves.
//!
//! An authority of the cluster draws a random secret and signs its hash, with an end and a number of uses. The
//! token goes to the host that is to join; the statement goes to all members, each of which can check the token
//! and none of which can make it out of the statement. The token names the cluster, so that its holder can have a
//! sponsor prove to be a member before the secret leaves the host.
//!
//! ## Layouts
//!
//! ```text
//! text         hbt1.<id, 8 hex digits>.<cluster prefix, 32>.<secret, 32>.<checksum, 8>
//! prefix       first 16 bytes of the cluster id
//! checksum     first 4 bytes of SHA-256("hauberk token text v1" 00 ‖ id ‖ prefix ‖ secret)
//! secret hash  SHA-256("hauberk token secret v1" 00 ‖ id ‖ prefix ‖ secret)
//!
//! statement, body (postcard), domain "hauberk token v1"
//! 0..32      cluster id
//! 32..36     id
//! 36..68     secret hash
//! 68..       expires: seconds since 1970, varint u64
//! +          uses: varint u32
//! +32        signer: identity key that signs
//!
//! revocation, body (postcard), domain "hauberk token revocation v1"
//! 0..32      cluster id
//! 32..36     id
//! 36..68     signer: identity key that signs
//! ```
//!
//! A plain hash is enough: nobody guesses 128 random bits.

use crate::cluster::ClusterId;
use crate::hexbytes::{decode_hex, fixed_bytes};
use crate::identity::{Identity, IdentityKey};
use crate::policy::{StatementError, for_cluster};
use crate::signed::{Signable, Signed, SignedError};
use rand_core::{CryptoRng, RngCore};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};
use std::fmt;
use subtle::ConstantTimeEq as _;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

fixed_bytes! {
    /// Public name of a token. Short, for people: two tokens may have the same.
    TokenId, 4, "token id"
}

fixed_bytes! {
    /// The first half of a cluster id: enough to tell it from all others.
    ClusterPrefix, 16, "cluster prefix"
}

fixed_bytes! {
    /// What all members know of a token's secret.
    TokenHash, 32, "token hash"
}

impl ClusterId {
    /// What a token carries of it.
    #[must_use]
    pub fn prefix(&self) -> ClusterPrefix {
        let mut prefix = [0; 16];
        prefix.copy_from_slice(&self.as_bytes()[..16]);
        ClusterPrefix::from_bytes(prefix)
    }
}

/// The 128 random bits of a token. Wiped on drop; `Debug` shows nothing of them. Serde is for the encrypted session.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct TokenSecret([u8; 16]);

impl fmt::Debug for TokenSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenSecret(redacted)")
    }
}

impl Serialize for TokenSecret {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        crate::hexbytes::array::serialize(&self.0, s)
    }
}

impl<'de> Deserialize<'de> for TokenSecret {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        crate::hexbytes::array::deserialize("token secret", d).map(Self)
    }
}

/// What the holder of a token has.
#[derive(Clone, Debug)]
pub struct JoinToken {
    /// Its public name.
    pub id: TokenId,
    /// The cluster that it lets into.
    pub cluster: ClusterPrefix,
    /// What lets in.
    pub secret: TokenSecret,
}

impl JoinToken {
    /// Draws a token for a cluster. It lets nobody in before an authority has signed its hash.
    #[must_use]
    pub fn generate(cluster: &ClusterId, rng: &mut (impl RngCore + CryptoRng)) -> Self {
        let mut id = [0; 4];
        rng.fill_bytes(&mut id);
        let mut secret = TokenSecret([0; 16]);
        rng.fill_bytes(&mut secret.0);
        Self { id: TokenId::from_bytes(id), cluster: cluster.prefix(), secret }
    }

    /// What the members are told of it.
    #[must_use]
    pub fn hash(&self) -> TokenHash {
        let hash = self.digest(b"hauberk token secret v1\0");
        TokenHash::from_bytes(hash)
    }

    /// The text form.
    #[must_use]
    pub fn to_text(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::with_capacity(TEXT_LEN));
        text.push_str(&format!("{STEM}{}.{}.", self.id, self.cluster));
        let secret = Zeroizing::new(hex::encode(self.secret.0));
        text.push_str(&secret);
        text.push('.');
        text.push_str(&hex::encode(self.checksum()));
        text
    }

    /// Reads the text form; white space around it does not matter.
    ///
    /// # Errors
    /// [`TokenTextError`] says whether it is something else, cut short or altered.
    pub fn from_text(text: &str) -> Result<Self, TokenTextError> {
        let groups = text.trim().strip_prefix(STEM).ok_or(TokenTextError::NotAToken)?;
        let groups: Vec<&str> = groups.split('.').collect();
        let [id, cluster, secret, checksum] = groups.as_slice() else { return Err(TokenTextError::Cut) };
        let mut token =
            Self { id: TokenId([0; 4]), cluster: ClusterPrefix([0; 16]), secret: TokenSecret([0; 16]) };
        let mut sum = [0; 4];
        for (text, bytes) in [
            (id, &mut token.id.0[..]),
            (cluster, &mut token.cluster.0[..]),
            (secret, &mut token.secret.0[..]),
            (checksum, &mut sum[..]),
        ] {
            decode_hex("token", text, bytes).map_err(|_| TokenTextError::Cut)?;
        }
        if sum != token.checksum() {
            return Err(TokenTextError::Checksum);
        }
        Ok(token)
    }

    fn checksum(&self) -> [u8; 4] {
        let mut hash = self.digest(b"hauberk token text v1\0");
        let mut sum = [0; 4];
        sum.copy_from_slice(&hash[..4]);
        hash.zeroize();
        sum
    }

    fn digest(&self, domain: &[u8]) -> [u8; 32] {
        Sha256::new()
            .chain_update(domain)
            .chain_update(self.id.as_bytes())
            .chain_update(self.cluster.as_bytes())
            .chain_update(self.secret.0)
            .finalize()
            .into()
    }
}

/// Why a text is no token. It says nothing of the text, which may be another secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenTextError {
    /// Some other text.
    #[error("it does not start with `{STEM}`; is it another kind of secret?")]
    NotAToken,
    /// Groups or digits are missing.
    #[error(
        "it is not four groups of 8, 32, 32 and 8 hex digits after `{STEM}`; was it cut short when it was copied?"
    )]
    Cut,
    /// Some digits are not the right ones.
    #[error("its checksum does not fit; a digit was changed when it was copied")]
    Checksum,
}

/// What all members know of a token. Signed, it is a [`SignedToken`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Token {
    /// The cluster that it lets into.
    pub cluster: ClusterId,
    /// Its public name.
    pub id: TokenId,
    /// Hash of its secret.
    pub hash: TokenHash,
    /// From this moment on, in seconds since 1970, it lets nobody in.
    pub expires: u64,
    /// How many nodes it lets in.
    pub uses: u32,
    /// Who signs.
    pub signer: IdentityKey,
}

impl Token {
    /// Whether `secret` is the token's, in constant time.
    #[must_use]
    pub fn fits(&self, secret: &TokenSecret) -> bool {
        let theirs = JoinToken { id: self.id, cluster: self.cluster.prefix(), secret: secret.clone() };
        self.hash.0.ct_eq(&theirs.hash().0).into()
    }
}

impl Signable for Token {
    const DOMAIN: &'static str = "hauberk token v1";
    const MAX_LEN: usize = 512;
}

/// A token's statement with its signature.
pub type SignedToken = Signed<Token>;

impl Signed<Token> {
    /// Checks that it is for `cluster` and that the signer named in it signed it.
    ///
    /// # Errors
    /// [`StatementError`]; nothing else may be concluded from the body then.
    pub fn check(&self, cluster: &ClusterId) -> Result<Token, StatementError> {
        let claimed = self.decode()?;
        for_cluster(cluster, claimed.cluster)?;
        Ok(self.verify(&claimed.signer)?)
    }
}

/// The statement that tokens of a name let nobody in any more. Signed, it is a [`SignedRevocation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Revocation {
    /// The cluster.
    pub cluster: ClusterId,
    /// The name.
    pub id: TokenId,
    /// Who signs.
    pub signer: IdentityKey,
}

impl Signable for Revocation {
    const DOMAIN: &'static str = "hauberk token revocation v1";
    const MAX_LEN: usize = 512;
}

/// A revocation with its signature.
pub type SignedRevocation = Signed<Revocation>;

impl Signed<Revocation> {
    /// Revokes the tokens called `id` in the name of `signer`.
    ///
    /// # Errors
    /// None in practice: the body has a bounded length.
    pub fn issue(cluster: ClusterId, id: TokenId, signer: &Identity) -> Result<Self, SignedError> {
        Self::sign(&Revocation { cluster, id, signer: signer.public() }, signer)
    }

    /// Checks that it is for `cluster` and that the signer named in it signed it.
    ///
    /// # Errors
    /// [`StatementError`]; nothing else may be concluded from the body then.
    pub fn check(&self, cluster: &ClusterId) -> Result<Revocation, StatementError> {
        let claimed = self.decode()?;
        for_cluster(cluster, claimed.cluster)?;
        Ok(self.verify(&claimed.signer)?)
    }
}

const STEM: &str = "hbt1.";
const TEXT_LEN: usize = STEM.len() + 8 + 1 + 32 + 1 + 32 + 1 + 8;

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        let secret = TokenSecret([3; 16]);
        JoinToken { id: TokenId([1; 4]), cluster: ClusterPrefix([2; 16]), secret }
    }

    #[test]
    fn every_typo_in_a_token_is_noticed() {
        let text = token().to_text();
        assert_eq!(text.len(), TEXT_LEN);
        assert_eq!(JoinToken::from_text(&format!(" {}\n", *text)).unwrap().to_text(), text);
        for at in STEM.len()..text.len() {
            let mut typo = text.as_bytes().to_vec();
            typo[at] = if typo[at] == b'a' { b'b' } else { b'a' };
            assert!(JoinToken::from_text(std::str::from_utf8(&typo).unwrap()).is_err(), "{at}");
            assert!(JoinToken::from_text(&text[..at]).is_err());
        }
        assert_eq!(JoinToken::from_text("hunter2").unwrap_err(), TokenTextError::NotAToken);
    }

    #[test]
    fn only_its_own_secret_fits_and_nothing_shows_it() {
        let cluster = ClusterId::from_bytes([2; 32]);
        let signer = Identity::from_bytes(&[9; 32]).public();
        let known = Token { cluster, id: TokenId([1; 4]), hash: token().hash(), expires: 1, uses: 1, signer };
        assert!(known.fits(&token().secret));
        assert!(!known.fits(&TokenSecret([4; 16])));
        assert!(!Token { id: TokenId([5; 4]), ..known }.fits(&token().secret), "nor for another name");
        assert!(!format!("{:?}", token()).contains("0303"));
    }
}
