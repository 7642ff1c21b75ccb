use proptest::prelude::*;

use super::*;

const DAY: u64 = 1_795_392_000;

fn usd(usd: f64) -> Usd {
    Usd::from_f64(usd)
}

fn at(seconds: u64) -> Periods {
    let day = crate::price::day(Duration::from_secs(seconds));
    let ends = Duration::from_secs((seconds / 86_400 + 1) * 86_400);
    Periods::new(day, ends, ends + Duration::from_secs(30 * 86_400))
}

fn used(shared: &[Option<Shared>; SHARED]) -> Vec<Option<f64>> {
    shared.iter().map(|one| one.map(|one| one.used.to_f64())).collect()
}

#[test]
fn a_new_day_is_new_and_the_month_goes_on() {
    let (mut book, mut purse) = (Book::default().checked(), Purse::default());
    purse.spent(usd(1.0), &at(DAY));
    book.write("a", Some("t"), &purse, None, &at(DAY));
    purse.spent(usd(1.5), &at(DAY + 86_400));
    let shared = book.write("a", Some("t"), &purse, None, &at(DAY + 86_400));
    assert_eq!(used(&shared), [1.5, 0.5, 1.5, 1.5, 0.5, 1.5].map(Some));
    let shared = book.write("b", Some("u"), &Purse::default(), None, &at(DAY + 8 * 86_400));
    assert_eq!(used(&shared), [1.5, 0.0, 0.0, 0.0, 0.0, 0.0].map(Some), "another tenant, in another month");
    let shared = book.write("c", None, &Purse::default(), None, &at(DAY + 86_400));
    assert_eq!(used(&shared), [Some(1.5), Some(0.5), Some(1.5), None, None, None]);
}

#[test]
fn who_asks_first_is_served_first_and_the_dead_reserve_nothing() {
    let (mut book, purse) = (Book::default().checked(), Purse::default());
    let container = |shared: [Option<Shared>; SHARED]| shared[0].unwrap().used;
    assert_eq!(container(book.write("a", None, &purse, Some(usd(0.2)), &at(DAY))), Usd::ZERO);
    assert_eq!(container(book.write("b", None, &purse, Some(usd(0.1)), &at(DAY))), usd(0.2));
    assert_eq!(container(book.write("a", None, &purse, Some(usd(0.2)), &at(DAY))), Usd::ZERO, "it keeps its place");
    assert_eq!(container(book.write("c", None, &purse, None, &at(DAY))), Usd::ZERO, "it does not ask");
    assert_eq!(container(book.write("c", None, &purse, Some(usd(0.4)), &at(DAY))), usd(0.3));
    // Nothing to go by: what the last one did.
    book.write("d", None, &purse, Some(Usd::ZERO), &at(DAY));
    assert_eq!(container(book.write("e", None, &purse, Some(usd(0.1)), &at(DAY))), usd(1.1));
    book.close("a");
    assert_eq!(container(book.write("e", None, &purse, Some(usd(0.1)), &at(DAY))), usd(0.9));
    let kept = serde_json::to_string(&book).unwrap();
    assert_eq!(serde_json::from_str::<Book>(&kept).unwrap().checked(), book);
}

#[test]
fn what_was_raised_for_a_day_is_forgotten_the_next() {
    let (mut book, purse) = (Book::default().checked(), Purse::default());
    book.raise(Scope::ContainerDay, None, usd(7.0), &at(DAY));
    book.raise(Scope::Tenant, Some("t"), usd(9.0), &at(DAY));
    let raised = |shared: [Option<Shared>; SHARED]| [shared[1], shared[3]].map(|one| one.and_then(|one| one.raised));
    assert_eq!(raised(book.write("a", Some("t"), &purse, None, &at(DAY))), [Some(usd(7.0)), Some(usd(9.0))]);
    assert_eq!(raised(book.write("a", Some("u"), &purse, None, &at(DAY))), [Some(usd(7.0)), None]);
    assert_eq!(raised(book.write("a", Some("t"), &purse, None, &at(DAY + 86_400))), [None, Some(usd(9.0))]);
}

proptest! {
    /// Agents that ask whenever they are let, in any order, with answers that cost at most so much.
    #[test]
    fn all_together_are_at_most_one_answer_above(steps in proptest::collection::vec((0..8_usize, 1..50_u64), 1..400)) {
        const CEILING: u64 = 1_000;
        const MOST: u64 = 50;
        let mut book = Book::default().checked();
        let mut purses = vec![Purse::default(); 8];
        let mut asking = [false; 8];
        let mut total = [0_u64; 8];
        for (who, cost) in steps {
            let run = who.to_string();
            if asking[who] {
                // Its answer is there.
                asking[who] = false;
                total[who] += cost;
                purses[who].spent(Usd::from_pico(total[who]), &at(DAY));
                book.write(&run, None, &purses[who], None, &at(DAY));
            } else {
                let shared = book.write(&run, None, &purses[who], Some(Usd::from_pico(MOST)), &at(DAY));
                asking[who] = shared[0].unwrap().used.pico() < CEILING;
                if !asking[who] {
                    book.write(&run, None, &purses[who], None, &at(DAY));
                }
            }
            // A wrapper dies now and then, and comes back as another.
            if cost == 1 {
                book.close(&run);
                purses[who] = Purse::default();
                total[who] = 0;
                asking[who] = false;
            }
        }
        let spent = book.write("x", None, &Purse::default(), None, &at(DAY))[0].unwrap().used.pico();
        let reserved = asking.iter().filter(|asks| **asks).count() as u64 * MOST;
        prop_assert!(spent.saturating_sub(reserved) < CEILING + MOST, "{spent} with {reserved} reserved");
    }
}
