use proptest::prelude::*;

use super::*;

const DAY: u64 = 1_795_392_000;

fn at(seconds: u64) -> Periods {
    let day = crate::price::day(Duration::from_secs(seconds));
    let ends = Duration::from_secs((seconds / 86_400 + 1) * 86_400);
    Periods::new(day, ends, ends + Duration::from_secs(30 * 86_400))
}

fn amount(usd: f64) -> Amount {
    Amount::new(Usd::from_f64(usd), 0)
}

fn claim(tenant: Option<&str>, asks: Option<Amount>) -> Claim<'_> {
    Claim { tenant, asks, ..Claim::default() }
}

/// A line of nobody's.
fn write(book: &mut Book, run: &str, purse: &Purse, asks: Option<Amount>, now: &Periods) -> Shared {
    book.write(run, purse, &claim(None, asks), now)[0].unwrap()
}

fn used(shared: &[Option<Shared>; SHARED]) -> Vec<Option<f64>> {
    shared.iter().map(|one| one.map(|one| one.spent.usd.to_f64())).collect()
}

#[test]
fn a_new_day_is_new_and_the_month_goes_on() {
    let (mut book, mut purse) = (Book::begun(0), Purse::default());
    purse.spent(amount(1.0), &at(DAY));
    book.write("a", &purse, &claim(Some("t"), None), &at(DAY));
    purse.spent(amount(1.5), &at(DAY + 86_400));
    let shared = book.write("a", &purse, &claim(Some("t"), None), &at(DAY + 86_400));
    assert_eq!(used(&shared), [1.5, 0.5, 1.5, 1.5, 0.5, 1.5].map(Some));
    let shared = book.write("b", &Purse::default(), &claim(Some("u"), None), &at(DAY + 8 * 86_400));
    assert_eq!(used(&shared), [1.5, 0.0, 0.0, 0.0, 0.0, 0.0].map(Some), "another tenant, in another month");
    let shared = book.write("c", &Purse::default(), &claim(None, None), &at(DAY + 86_400));
    assert_eq!(used(&shared), [Some(1.5), Some(0.5), Some(1.5), None, None, None]);
}

#[test]
fn who_asks_first_is_served_first_and_the_dead_reserve_nothing() {
    let (mut book, purse) = (Book::begun(0), Purse::default());
    let mut before = |run: &str, asks: Option<f64>| write(&mut book, run, &purse, asks.map(amount), &at(DAY)).before;
    assert_eq!(before("a", Some(0.2)), Amount::NONE);
    assert_eq!(before("b", Some(0.1)), amount(0.2));
    assert_eq!(before("a", Some(0.2)), Amount::NONE, "it keeps its place");
    assert_eq!(before("c", None), Amount::NONE, "it does not ask");
    assert_eq!(before("c", Some(0.4)), amount(0.3));
    // Nothing to go by: what the last one did.
    before("d", Some(0.0));
    assert_eq!(before("e", Some(0.1)), amount(1.1));
    book.close("a");
    let shared = write(&mut book, "e", &purse, Some(amount(0.1)), &at(DAY));
    assert_eq!((shared.before, shared.reserved), (amount(0.9), amount(1.0)));
    let kept = serde_json::to_string(&book).unwrap();
    assert_eq!(serde_json::from_str::<Book>(&kept).unwrap(), book);
}

#[test]
fn what_was_raised_for_a_day_is_forgotten_the_next() {
    let (mut book, purse) = (Book::begun(0), Purse::default());
    let usd = |usd: f64| Caps { usd: Some(Usd::from_f64(usd)), tokens: None };
    book.raise(Scope::ContainerDay, None, usd(7.0), &at(DAY));
    book.raise(Scope::ContainerDay, None, Caps { usd: None, tokens: Some(500) }, &at(DAY));
    book.raise(Scope::Tenant, Some("a b"), usd(9.0), &at(DAY));
    let mut raised = |tenant: &str, now: u64| {
        let shared = book.write("a", &purse, &claim(Some(tenant), None), &at(now));
        [shared[1], shared[3]].map(|one| one.unwrap().raised)
    };
    let day = Caps { tokens: Some(500), ..usd(7.0) };
    assert_eq!(raised("a b", DAY), [day, usd(9.0)]);
    assert_eq!(raised("u", DAY), [day, Caps::default()]);
    assert_eq!(raised("a b", DAY + 86_400), [Caps::default(), usd(9.0)]);
}

#[test]
fn what_was_raised_makes_room_when_its_day_is_over() {
    let mut book = Book::begun(0);
    let caps = Caps { usd: None, tokens: Some(1) };
    for n in 0..TENANTS {
        assert!(book.raise(Scope::TenantDay, Some(&n.to_string()), caps, &at(DAY)));
    }
    assert!(!book.raise(Scope::TenantDay, Some("one more"), caps, &at(DAY)));
    assert!(book.raise(Scope::TenantDay, Some("7"), caps, &at(DAY)), "it has its place");
    assert!(book.raise(Scope::TenantDay, Some("one more"), caps, &at(DAY + 86_400)));
    assert_eq!(book.raised.len(), 1);
}

#[test]
fn who_was_taken_for_dead_tells_what_it_has_spent_since() {
    let (mut book, mut purse) = (Book::begun(0), Purse::default());
    purse.spent(amount(1.0), &at(DAY));
    write(&mut book, "a", &purse, None, &at(DAY));
    book.close("a");
    purse = Purse::since(amount(1.0));
    purse.spent(amount(1.5), &at(DAY));
    assert_eq!(write(&mut book, "a", &purse, None, &at(DAY)).spent, amount(1.5));
}

#[test]
fn everybody_can_see_how_each_budget_stands() {
    let (mut book, mut purse) = (Book::begun(0), Purse::default());
    let mut caps = [Caps::default(); SHARED];
    caps[1].tokens = Some(1_000);
    caps[5].usd = Some(Usd::from_f64(2.0));
    purse.spent(Amount::new(Usd::from_f64(0.5), 70), &at(DAY));
    let waits = [Scope::TenantMonth];
    let claim = Claim { tenant: Some("t"), asks: Some(Amount::new(Usd::ZERO, 30)), waits: &waits, caps, ..Claim::default() };
    book.write("a", &purse, &claim, &at(DAY));
    book.write("b", &Purse::default(), &Claim { tenant: Some("u"), waits: &[], ..claim }, &at(DAY));
    let standings = book.standings(&at(DAY), Duration::from_secs(DAY));
    let names: Vec<_> = standings.iter().map(|one| (one.scope.as_str(), one.tenant.as_deref())).collect();
    assert_eq!(names, [("container_day", None), ("tenant_month", Some("t")), ("tenant_month", Some("u"))]);
    let day = &standings[0];
    assert_eq!((day.caps.tokens, day.spent.tokens, day.reserved.tokens, day.waits.len()), (Some(1_000), 70, 60, 0));
    assert_eq!(day.period.as_ref().unwrap().0, "2026-11-23");
    assert_eq!((standings[1].reserved.tokens, standings[1].waits.as_slice()), (30, [String::from("a")].as_slice()));
}

proptest! {
    /// Agents that ask whenever they are let, in any order, with answers that cost at most so much, in money and in tokens.
    #[test]
    fn all_together_are_at_most_one_answer_above(steps in proptest::collection::vec((0..8_usize, 1..50_u64), 1..400)) {
        const CEILING: u64 = 1_000;
        const MOST: u64 = 50;
        let both = |n: u64| Amount::from((n, n));
        let mut book = Book::begun(0);
        let mut purses = vec![Purse::default(); 8];
        let mut asking = [false; 8];
        let mut total = [0_u64; 8];
        for (who, cost) in steps {
            let run = who.to_string();
            if asking[who] {
                // Its answer is there.
                asking[who] = false;
                total[who] += cost;
                purses[who].spent(both(total[who]), &at(DAY));
                write(&mut book, &run, &purses[who], None, &at(DAY));
            } else {
                let shared = write(&mut book, &run, &purses[who], Some(both(MOST)), &at(DAY));
                prop_assert_eq!(shared.spent.tokens, shared.spent.usd.pico());
                asking[who] = (shared.spent + shared.before).tokens < CEILING;
                if !asking[who] {
                    write(&mut book, &run, &purses[who], None, &at(DAY));
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
        let shared = write(&mut book, "x", &Purse::default(), None, &at(DAY));
        let reserved = asking.iter().filter(|asks| **asks).count() as u64 * MOST;
        prop_assert_eq!(shared.reserved.tokens, reserved);
        prop_assert!(shared.spent.tokens < CEILING + MOST, "{:?} with {} reserved", shared.spent, reserved);
    }
}

proptest! {
    /// The same, where whoever has an answer asks again in the same breath, and waits for several at once.
    #[test]
    fn who_asks_again_at_once_comes_after_those_who_have_asked(steps in proptest::collection::vec((0..5_usize, 1..50_u64), 1..400)) {
        const CEILING: u64 = 1_000;
        const MOST: u64 = 50;
        let both = |n: u64| Amount::from((n, n));
        let mut book = Book::begun(0);
        let mut purses = vec![Purse::default(); 5];
        let (mut requests, mut total, mut open) = ([0_u64; 5], [0_u64; 5], [0_u64; 5]);
        for (who, cost) in steps {
            let run = who.to_string();
            // Every third time it has a second thread, that asks before the first has its answer.
            if open[who] > 0 && cost % 3 != 0 {
                open[who] -= 1;
                total[who] += cost;
                purses[who].spent(both(total[who]), &at(DAY));
            }
            requests[who] += 1;
            let claim = |answers: u64| Claim { asks: (answers > 0).then(|| both(MOST)), answers, request: requests[who], ..Claim::default() };
            let shared = book.write(&run, &purses[who], &claim(open[who] + 1), &at(DAY))[0].unwrap();
            if (shared.spent + shared.before).tokens < CEILING {
                open[who] += 1;
            } else {
                book.write(&run, &purses[who], &claim(open[who]), &at(DAY));
            }
        }
        let rest: u64 = open.iter().sum::<u64>() * MOST;
        prop_assert!(total.iter().sum::<u64>() + rest < CEILING + MOST, "{total:?} and {open:?} to come");
    }
}

#[test]
fn what_is_taken_from_the_book_is_put_back_by_who_has_seen_it() {
    let now = at(DAY);
    let mut purse = Purse::default();
    purse.spent(amount(0.5), &now);
    let mut before = Book::begun(0);
    let mut past = Purse::default();
    past.spent(amount(2.0), &now);
    before.write("gone", &past, &claim(Some("t"), None), &now);
    before.close("gone");
    before.write("a", &purse, &claim(Some("t"), None), &now);
    let mut witness = Witness::default();
    witness.remember(&before, "a");

    let mended = |mut book: Book| {
        let said = witness.mend(&mut book, "a");
        let shared = book.write("a", &purse, &claim(Some("t"), None), &now);
        (said, shared[0].unwrap().spent, shared[4].unwrap().spent)
    };
    let whole = (amount(2.5), amount(2.5));
    let (said, ever, day) = mended(before.clone());
    assert_eq!((said, (ever, day)), ((false, false), whole));
    // Emptied; the dead taken out; our own line made smaller.
    let mut smaller = before.clone();
    smaller.runs.get_mut("a").unwrap().spent = Spent::default();
    for book in [Book::begun(0), Book { past: BTreeMap::new(), ..before.clone() }, smaller] {
        let (said, ever, day) = mended(book);
        assert_eq!((said, (ever, day)), ((true, false), whole));
    }
    // Somebody has taken us for dead: then it is there already, and is not told twice.
    let mut closed = before.clone();
    closed.close("a");
    assert_eq!(witness.mend(&mut closed, "a"), (false, true));
    // What others do is theirs.
    let mut more = before;
    more.write("b", &past, &claim(Some("t"), None), &now);
    more.close("b");
    assert_eq!(witness.mend(&mut more, "a"), (false, false));
}
