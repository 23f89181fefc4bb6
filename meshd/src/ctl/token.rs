//! `token`: secrets for joining that end by themselves.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Subcommand;
use comfy_table::{Table, presets};
use hyper::Method;
use mesh_core::api::{NewToken, RevocationRequest, TokenList, TokenRequest, TokenStatus};
use mesh_keys::rand_core::OsRng;
use mesh_keys::{JoinToken, Signed, SignedRevocation, Token, TokenId};

use super::authority::{admin_key, duration, unix_now};
use super::{Client, print};

#[derive(Debug, Subcommand)]
pub(super) enum TokenVerb {
    /// Make a token and show it, this once: write it to a file of mode 0600 on the host that is to join, for
    /// `meshd --token-file`
    Create {
        /// When it ends, such as 90s, 15m, 24h or 7d
        #[arg(long, value_name = "TIME", default_value = "24h", value_parser = duration)]
        expires: Duration,
        /// How many hosts may join by it
        #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
        uses: u32,
        /// File with the secret admin key, in a cluster that has one
        #[arg(long, value_name = "FILE")]
        admin_key_file: Option<PathBuf>,
    },
    /// The tokens that there are, without their secrets
    List,
    /// Let nobody join by a token any more
    Revoke {
        /// Its id: the 8 digits after `hbt1.`
        id: TokenId,
        /// File with the secret admin key, in a cluster that has one
        #[arg(long, value_name = "FILE")]
        admin_key_file: Option<PathBuf>,
    },
}

pub(super) fn run(client: &Client, verb: &TokenVerb) -> Result<ExitCode> {
    let list: TokenList = client.get("/v1/tokens")?;
    match verb {
        TokenVerb::List => print(table(&list.tokens).trim_end()),
        TokenVerb::Create { expires, uses, admin_key_file } => {
            let key = admin_key(admin_key_file.as_deref(), &list.admin_keys)?;
            let secret = JoinToken::generate(&list.cluster, &mut OsRng);
            let (id, hash, uses) = (secret.id, secret.hash(), *uses);
            let expires = unix_now() + expires.as_secs();
            let request = match key {
                None => TokenRequest::New(NewToken { id, hash, expires, uses }),
                Some(key) => {
                    let (cluster, signer) = (list.cluster, key.public());
                    let token = Token { cluster, id, hash, expires, uses, signer };
                    TokenRequest::Signed(Signed::sign(&token, key.signer())?)
                }
            };
            client.send(Method::POST, "/v1/tokens", &request)?;
            // What is to be copied goes to standard output alone.
            writeln!(std::io::stderr(), "token {id}: shown this once; keep it as secret as a password")
                .context("standard error")?;
            print(&secret.to_text())
        }
        TokenVerb::Revoke { id, admin_key_file } => {
            if !list.tokens.iter().any(|token| token.id == *id) {
                anyhow::bail!("there is no token {id}; `meshctl token list` shows those that there are");
            }
            let request = match admin_key(admin_key_file.as_deref(), &list.admin_keys)? {
                None => RevocationRequest::Id(*id),
                Some(key) => {
                    RevocationRequest::Signed(SignedRevocation::issue(list.cluster, *id, key.signer())?)
                }
            };
            client.send(Method::POST, "/v1/tokens/revocations", &request)?;
            print(&format!("token {id} is revoked; who has joined by it stays"))
        }
    }
}

fn table(tokens: &[TokenStatus]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["TOKEN", "USED", "ENDS IN", "STATE"]);
    for token in tokens {
        table.add_row([
            token.id.to_string(),
            format!("{} of {}", token.used, token.uses),
            match token.expires.saturating_sub(unix_now()) {
                0 => "-".to_owned(),
                seconds => format!("{seconds} s"),
            },
            token.refused.clone().unwrap_or_else(|| "valid".to_owned()),
        ]);
    }
    format!("{table}\n")
}
