//! The measurements work, and say the same for the same seed.

use std::time::Duration;

use mesh_sim::figures::{self, Figure};
use mesh_sim::settings::Settings;

#[test]
fn a_cluster_that_has_come_about_by_itself_is_measured_too() {
    let settings = Settings { plain: true, ..Settings::standard(8, 5, Duration::from_secs(60)) };
    let which = [Figure::Record, Figure::Crash, Figure::Split, Figure::Join, Figure::Removal];
    let figures = figures::take(settings, &which, |_, _, _| ()).unwrap().0;
    assert!(which.iter().all(|figure| figures.has(*figure)), "{figures:?}");
    assert!(figures.record_to_all_p99.unwrap() < Duration::from_secs(2), "{figures:?}");
    assert_eq!(figures.breaches, 0);
}

#[test]
fn a_converged_cluster_is_measured_alike_for_the_same_seed() {
    let settings = || Settings::standard(8, 5, Duration::from_secs(60));
    let take = || figures::take(settings(), &Figure::ALL, |_, _, _| ()).unwrap().0;
    let figures = take();
    assert_eq!(figures, take());
    assert!(figures.record_to_all_p99.unwrap() < Duration::from_secs(2), "{figures:?}");
    assert!(figures.crash_known.unwrap() < Duration::from_secs(30), "{figures:?}");
    assert!(figures.heal.unwrap() < Duration::from_secs(40), "{figures:?}");
    let bytes = figures.bytes_per_node.unwrap();
    assert!(bytes > 0.0 && bytes < 500.0, "{figures:?}");
    let (tunnel, known) = figures.join_p99.unwrap();
    assert!(Duration::ZERO < tunnel && tunnel < known.max(Duration::from_secs(3)), "{figures:?}");
    assert!(known < Duration::from_secs(10), "{figures:?}");
    assert!(figures.removal_p99.unwrap() < Duration::from_secs(5), "{figures:?}");
    assert_eq!(figures.breaches, 0);
}
