//! Tokens: joining by one, letting in by one, making and revoking them.

use mesh_keys::token::{ClusterPrefix, TokenSecret};
use mesh_keys::{Genesis, JoinMode, Signed, SignedAdmission, SignedRevocation, Token, TokenId};

use super::join::{Joining, Sponsoring};
use super::sessions::Phase;
use super::{JoinSecret, Node, RequestId, SessionId};
use crate::api::{ApiError, ErrorCode, NewToken, TokenList, TokenStatus};
use crate::message::{Message, RefusalCode};
use crate::view::{Delta, TokenRefused, View};

impl Node {
    // The joining end.

    /// The sponsor has shown the genesis document and its admissions. Only if the document is that of the token's
    /// cluster, and the admissions lead from its founder to the key of this session, does the secret go out.
    pub(super) fn on_token_proof(&mut self, session: SessionId, genesis: &[u8], chain: Vec<SignedAdmission>) {
        let Some(sponsor) = self.sessions.get(&session).map(|entry| entry.peer) else { return };
        let JoinSecret::Token(token) = &self.config.secret else { return };
        let proven = Genesis::decode(genesis).is_ok_and(|genesis| {
            let fits = genesis.id().prefix() == token.cluster;
            let mut view = View::new(genesis);
            view.merge(&Delta { admissions: chain, ..Delta::default() });
            fits && view.admissions().contains(&sponsor)
        });
        if !proven {
            let reason = "it has not shown that it is a member of the token's cluster";
            tracing::warn!("the token is not sent: {reason}");
            return self.refuse(session, RefusalCode::NotMember, reason);
        }
        let message = Message::JoinToken { id: token.id, secret: token.secret.clone() };
        self.set_phase(session, Phase::Joining(Joining::TokenSent));
        self.send(session, &message);
    }

    // The admitting end.

    pub(super) fn on_token_ask(&mut self, session: SessionId, cluster: &ClusterPrefix) {
        let Some(view) = &self.view else { return };
        if view.cluster().prefix() != *cluster {
            return self.refuse(session, RefusalCode::OtherCluster, "the token is for another cluster");
        }
        let message = Message::TokenProof { genesis: view.genesis().encode(), chain: self.own_chain(view) };
        self.set_phase(session, Phase::Sponsoring(Sponsoring::TokenProved));
        self.send(session, &message);
    }

    pub(super) fn on_token(&mut self, session: SessionId, id: &TokenId, secret: &TokenSecret) {
        let Some(view) = &self.view else { return };
        match view.redeem(id, secret, self.unix_now()) {
            Ok(token) => {
                let proven = Sponsoring::Proven(JoinMode::Token(token.id));
                self.set_phase(session, Phase::Sponsoring(proven));
                self.send(session, &Message::JoinTokenOk);
            }
            Err(error) => {
                tracing::warn!(token = %id, %error, "a node tried to join by a token in vain");
                self.refuse(session, RefusalCode::BadToken, &error.to_string());
            }
        }
    }

    pub(super) fn token_still_valid(&self, id: &TokenId) -> Result<(), (RefusalCode, String)> {
        let Some(view) = &self.view else { return Ok(()) };
        let now = self.unix_now();
        let mut refused = TokenRefused::Unknown;
        for token in view.tokens().filter(|token| token.id == *id) {
            match view.check_token(token, now) {
                Ok(()) => return Ok(()),
                Err(error) => refused = error,
            }
        }
        Err((RefusalCode::BadToken, refused.to_string()))
    }

    // Making and revoking.

    pub(super) fn token_list(&self) -> Result<TokenList, ApiError> {
        let view = self.speaker()?;
        let now = self.unix_now();
        let status = |token: &Token| TokenStatus {
            id: token.id,
            expires: token.expires,
            uses: token.uses,
            used: view.token_uses(&token.id),
            refused: view.check_token(token, now).err().map(|error| error.to_string()),
            signer: token.signer,
        };
        let mut tokens: Vec<TokenStatus> = view.tokens().map(status).collect();
        tokens.sort_by_key(|token| (std::cmp::Reverse(token.expires), token.id));
        Ok(TokenList { cluster: view.cluster(), admin_keys: view.genesis().admin_keys().to_vec(), tokens })
    }

    pub(super) fn on_create_token(&mut self, request: RequestId, new: &NewToken) {
        let NewToken { id, hash, expires, uses } = *new;
        let signed = self.signing_speaker().and_then(|view| {
            let token = Token { cluster: view.cluster(), id, hash, expires, uses, signer: self.me };
            Signed::sign(&token, &self.identity)
                .map_err(|error| ApiError::new(ErrorCode::Invalid, error.to_string()))
        });
        match signed {
            Ok(token) => self.on_declare(request, &Delta { tokens: vec![token], ..Delta::default() }),
            Err(error) => self.reply(request, Err(error)),
        }
    }

    pub(super) fn on_revoke_token(&mut self, request: RequestId, id: TokenId) {
        let signed = self.signing_speaker().and_then(|view| {
            SignedRevocation::issue(view.cluster(), id, &self.identity)
                .map_err(|error| ApiError::new(ErrorCode::Invalid, error.to_string()))
        });
        match signed {
            Ok(revocation) => {
                self.on_declare(request, &Delta { revocations: vec![revocation], ..Delta::default() });
            }
            Err(error) => self.reply(request, Err(error)),
        }
    }
}
