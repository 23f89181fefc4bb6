//! Who belongs to the cluster and who may join: the documents of the requests that need an authority.
//!
//! In a flat cluster the daemon signs them. In an anchored one the admin key never comes near it: the program that
//! holds the key asks what is to be said, signs, and sends the signed bytes.

use mesh_keys::token::TokenHash;
use mesh_keys::{
    BodyId, ClusterId, IdentityKey, JoinWindow, NodeId, SignedJoinPolicy, SignedRemoval, SignedRevocation,
    SignedToken, TokenId,
};
use serde::{Deserialize, Serialize};

/// What the removal of a node has to say, and what the operator should know before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemovalPlan {
    /// The cluster.
    pub cluster: ClusterId,
    /// Who may sign; empty in a flat cluster, where the daemon does.
    pub admin_keys: Vec<IdentityKey>,
    /// Id of the node.
    pub node: NodeId,
    /// Its label, when it has said one.
    pub name: Option<String>,
    /// Whether it is the node that was asked.
    pub this_node: bool,
    /// Why it seems to be alive, in a phrase; absent when nothing is heard of it.
    pub alive: Option<String>,
    /// Whether it may know the secret by which nodes join.
    pub knows_join_secret: bool,
    /// Its identity key.
    pub subject: IdentityKey,
    /// Who takes over its addresses.
    pub heir: IdentityKey,
    /// The nodes that it had let in and that stay.
    pub keep: Vec<NodeId>,
    /// The grants by it that members' addresses rest on.
    pub grants: Vec<BodyId>,
    /// The join policy in force.
    pub joins: JoinWindowStatus,
}

/// A node is to be removed for good: body of `POST /v1/removals`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RemovalRequest {
    /// This one, by the signature of the daemon: in flat clusters.
    Node(NodeId),
    /// By an admin key; all of it, or nothing.
    Signed {
        /// The removal.
        removal: SignedRemoval,
        /// Joining ends with it.
        policy: Option<SignedJoinPolicy>,
    },
}

/// When nodes may join by key file or password.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinWindowStatus {
    /// The cluster.
    pub cluster: ClusterId,
    /// Who may change it; empty in a flat cluster, where any member may.
    pub admin_keys: Vec<IdentityKey>,
    /// What was said last.
    pub window: JoinWindow,
    /// Whether this node lets others in at the moment.
    pub open: bool,
    /// Who said it: an admin key or a member; absent when nobody said anything.
    pub signer: Option<IdentityKey>,
    /// The serial that the next statement needs.
    pub next_serial: u64,
}

/// Body of `PUT /v1/join-window`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JoinWindowRequest {
    /// By the signature of the daemon: in flat clusters.
    Set(JoinWindow),
    /// By an admin key.
    Signed(SignedJoinPolicy),
}

/// All tokens that members know of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenList {
    /// The cluster.
    pub cluster: ClusterId,
    /// Who may sign tokens; empty in a flat cluster, where any member may.
    pub admin_keys: Vec<IdentityKey>,
    /// The tokens, those that end last first.
    pub tokens: Vec<TokenStatus>,
}

/// A token, without its secret, which nobody has but who was given it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenStatus {
    /// Its name.
    pub id: TokenId,
    /// When it ends, in seconds since 1970.
    pub expires: u64,
    /// How many nodes it is for.
    pub uses: u32,
    /// How many have joined by it.
    pub used: usize,
    /// Why it lets nobody in, in a sentence; absent when it does.
    pub refused: Option<String>,
    /// Who signed it.
    pub signer: IdentityKey,
}

/// A token that the daemon shall sign: its secret stays with who made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewToken {
    /// Its name.
    pub id: TokenId,
    /// Hash of its secret.
    pub hash: TokenHash,
    /// When it ends, in seconds since 1970.
    pub expires: u64,
    /// How many nodes it is for.
    pub uses: u32,
}

/// Body of `POST /v1/tokens`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TokenRequest {
    /// By the signature of the daemon: in flat clusters.
    New(NewToken),
    /// By an admin key.
    Signed(SignedToken),
}

/// Body of `POST /v1/tokens/revocations`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RevocationRequest {
    /// By the signature of the daemon: in flat clusters.
    Id(TokenId),
    /// By an admin key.
    Signed(SignedRevocation),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_form_that_other_programs_know() {
        let node = NodeId::from_bytes([1; 16]);
        let text = format!("{{\"node\":\"{node}\"}}");
        assert_eq!(serde_json::to_string(&RemovalRequest::Node(node)).unwrap(), text);
        for (window, text) in [
            (JoinWindow::Open, r#"{"set":"open"}"#),
            (JoinWindow::Closed, r#"{"set":"closed"}"#),
            (JoinWindow::Until(5), r#"{"set":{"until":5}}"#),
        ] {
            let request = JoinWindowRequest::Set(window);
            assert_eq!(serde_json::to_string(&request).unwrap(), text);
            assert_eq!(serde_json::from_str::<JoinWindowRequest>(text).unwrap(), request);
        }
        let admin = mesh_keys::Identity::from_bytes(&[2; 32]);
        let cluster = ClusterId::from_bytes([3; 32]);
        let policy = SignedJoinPolicy::issue(cluster, 1, JoinWindow::Closed, &admin).unwrap();
        let removal = SignedRemoval::issue(
            cluster,
            mesh_keys::Identity::from_bytes(&[4; 32]).public(),
            admin.public(),
            vec![node],
            &admin,
        );
        let request = RemovalRequest::Signed { removal: removal.unwrap(), policy: Some(policy.clone()) };
        let text = serde_json::to_string(&request).unwrap();
        assert!(text.contains(&hex::encode(policy.to_bytes())), "{text}");
        assert_eq!(serde_json::from_str::<RemovalRequest>(&text).unwrap(), request);
    }
}
