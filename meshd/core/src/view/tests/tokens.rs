//! Tokens: whom they let in, and for how long.

use super::*;

const TWO: [Act; 2] = [Act::Admit { sponsor: 0, subject: 1 }, Act::Admit { sponsor: 0, subject: 2 }];

fn made(acts: &[Act]) -> View {
    let token = [Act::Token { signer: 1, number: 0, uses: 1 }];
    view(&[&TWO[..], &token, acts].concat())
}

#[test]
fn a_token_lets_in_until_its_end_and_as_often_as_it_may() {
    let mut view = made(&[]);
    assert_eq!(redeemed(&view, 0, Some(99)), Ok(()));
    assert_eq!(redeemed(&view, 0, Some(100)), Err(TokenRefused::Expired));
    assert_eq!(redeemed(&view, 0, None), Err(TokenRefused::NoTime));
    assert_eq!(redeemed(&view, 1, Some(99)), Err(TokenRefused::Unknown));
    let wrong = token(&view, 1).secret.clone();
    assert_eq!(view.redeem(&token(&view, 0).id, &wrong, Some(1)), Err(TokenRefused::Unknown));
    perform(&mut view, &identities(), &Act::AdmitByToken { sponsor: 2, subject: 3, number: 0 });
    assert_eq!(redeemed(&view, 0, Some(99)), Err(TokenRefused::UsedUp), "whoever let it in");
    assert_eq!(view.token_uses(&token(&view, 0).id), 1);
}

#[test]
fn a_revoked_token_lets_nobody_in_even_when_who_revoked_it_is_removed() {
    let revoke = Act::Revoke { signer: 2, number: 0 };
    let remove = Act::Remove { signer: 0, subject: 2 };
    for acts in [&[revoke.clone()][..], &[revoke.clone(), remove.clone()], &[remove, revoke]] {
        assert_eq!(redeemed(&made(acts), 0, Some(1)), Err(TokenRefused::Revoked), "{acts:?}");
    }
}

#[test]
fn the_tokens_of_a_removed_member_and_of_strangers_let_nobody_in() {
    let removed = made(&[Act::Remove { signer: 0, subject: 1 }]);
    assert_eq!(redeemed(&removed, 0, Some(1)), Err(TokenRefused::Unknown));
    assert_eq!(removed.tokens().count(), 0);
    let strangers = view(&[Act::Token { signer: 4, number: 0, uses: 1 }]);
    assert_eq!(strangers, view(&[]));
}

#[test]
fn in_an_anchored_cluster_only_the_admin_makes_and_revokes_tokens() {
    let nodes = identities();
    let mut view = view_in(true, &[&TWO[..], &[Act::Token { signer: 0, number: 0, uses: 1 }]].concat());
    let id = token(&view, 0).id;
    let hash = token(&view, 1).hash();
    let by_member =
        Token { cluster: view.cluster(), id, hash, expires: 9, uses: 9, signer: nodes[0].public() };
    let tokens = vec![
        Signed::sign(&by_member, &nodes[0]).unwrap(),
        Signed::sign(&Token { signer: admin().public(), ..by_member }, &nodes[0]).unwrap(),
    ];
    let revocations = vec![SignedRevocation::issue(view.cluster(), id, &nodes[0]).unwrap()];
    let refused = view.merge(&Delta { tokens, revocations, ..Delta::default() }).refused;
    assert_eq!(refused.len(), 3, "{refused:?}");
    assert_eq!(redeemed(&view, 0, Some(1)), Ok(()));
}

#[test]
fn who_came_by_a_token_knows_no_other_secret() {
    let by_token = Act::AdmitByToken { sponsor: 1, subject: 3, number: 0 };
    let view = made(std::slice::from_ref(&by_token));
    let knows = |view: &View, node: usize| view.admissions().knows_join_secret(&identities()[node].public());
    assert_eq!([0, 1, 3].map(|node| knows(&view, node)), [true, true, false]);
    let twice = made(&[by_token, Act::Admit { sponsor: 1, subject: 3 }]);
    assert!(knows(&twice, 3));
}
