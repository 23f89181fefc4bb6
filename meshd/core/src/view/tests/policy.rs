//! The join policy: whose word counts.

use super::*;

const TWO: [Act; 2] = [Act::Admit { sponsor: 0, subject: 1 }, Act::Admit { sponsor: 0, subject: 2 }];

fn closed(signer: usize) -> Act {
    Act::Window { signer, window: JoinWindow::Closed }
}

#[test]
fn joining_is_open_until_someone_says_otherwise_and_the_last_word_counts() {
    let mut view = view(&TWO);
    assert_eq!((view.join_window(), view.join_policy()), (JoinWindow::Open, None));
    for (signer, window) in [(1, JoinWindow::Closed), (2, JoinWindow::Until(7)), (0, JoinWindow::Open)] {
        perform(&mut view, &identities(), &Act::Window { signer, window });
        assert_eq!(view.join_window(), window);
    }
}

#[test]
fn who_is_no_authority_is_not_heeded() {
    let nodes = identities();
    let mut flat = view(&TWO);
    let mut anchored = view_in(true, &TWO);
    assert!(matches!(
        flat.issue_policy(JoinWindow::Closed, &nodes[4]),
        Err(NoAuthority::UnknownMember { .. })
    ));
    assert!(matches!(
        anchored.issue_policy(JoinWindow::Closed, &nodes[1]),
        Err(NoAuthority::NotAdmin { .. })
    ));
    for (view, signer, words) in
        [(&mut flat, &nodes[4], "not known"), (&mut anchored, &nodes[0], "no admin key")]
    {
        let policy = SignedJoinPolicy::issue(view.cluster(), 9, JoinWindow::Closed, signer).unwrap();
        let merged = view.merge(&Delta { policies: vec![policy], ..Delta::default() });
        assert!(merged.refused[0].contains(words), "{:?}", merged.refused);
        assert_eq!(view.join_policy(), None);
    }
    let forged = JoinPolicy {
        cluster: anchored.cluster(),
        serial: 9,
        signer: admin().public(),
        window: JoinWindow::Closed,
    };
    let policies = vec![Signed::sign(&forged, &nodes[0]).unwrap()];
    let merged = anchored.merge(&Delta { policies, ..Delta::default() });
    assert!(merged.refused[0].contains("does not verify"), "{:?}", merged.refused);
    perform(&mut anchored, &nodes, &closed(0));
    assert_eq!(anchored.join_window(), JoinWindow::Closed, "the admin is heeded");
}

#[test]
fn a_removed_member_of_a_flat_cluster_has_no_say() {
    let remove = Act::Remove { signer: 0, subject: 1 };
    let dictate = Act::Dictate { signer: 1, serial: u64::MAX, window: JoinWindow::Closed };
    for order in [[closed(1), remove.clone()], [remove.clone(), closed(1)], [dictate.clone(), remove]] {
        let mut view = view(&[&TWO[..], &order].concat());
        assert_eq!(view.join_window(), JoinWindow::Open, "{order:?}");
        perform(&mut view, &identities(), &dictate);
        assert_eq!(view.join_policy(), None);
    }
}

#[test]
fn who_is_out_by_its_sponsor_has_no_say_either() {
    let acts = [Act::Admit { sponsor: 0, subject: 1 }, Act::Admit { sponsor: 1, subject: 2 }, closed(2)];
    let mut view = view(&acts);
    assert_eq!(view.join_window(), JoinWindow::Closed);
    perform(&mut view, &identities(), &Act::Oust { signer: 0, subject: 1, heir: 0, keep: 0 });
    assert_eq!(view.join_window(), JoinWindow::Open);
}
