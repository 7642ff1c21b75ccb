//! The fold from ledger lines to the rows of a bill: what was used, by whom, on which day, in units that have a price.
//!
//! A line's money is one sum for tokens of five kinds and for searches. It is divided among them by the price list, and what the
//! division leaves over goes to the largest part: rows add up to the lines, to the last picodollar. Sums may fall below zero where a
//! confirmation took back on one day what was counted on another.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use crate::price::{PriceTable, WEB_SEARCH};
use crate::record::{Fact, Record};
use crate::tokens::{Tokens, Usd};
use crate::update::Basis;
use crate::who::Who;

/// Lines that a run may write before its session has a name; there are two or three.
const NAMELESS: usize = 64;

/// Prices that have begun by then: all of them.
const EVER: Duration = Duration::from_secs(253_402_300_799);

/// How far rows are apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    Session,
    Tenant,
    Model,
}

/// Whose a row is. What a bill is not made by is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Payer {
    pub tenant: Option<Arc<str>>,
    pub team: Option<Arc<str>>,
    pub cost_center: Option<Arc<str>>,
    pub session: Option<Arc<str>>,
}

/// What has a price.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Item {
    /// Tokens of a kind, by its place in [`crate::tokens::TOKEN_KINDS`].
    Tokens {
        model: Arc<str>,
        kind: usize,
    },
    WebSearches {
        model: Arc<str>,
    },
    /// Money of a model that no quantity explains.
    Rest {
        model: Arc<str>,
    },
    /// Nanoseconds of the container.
    Container,
}

/// One row.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The day, as it was handed in.
    pub day: u32,
    pub payer: Payer,
    pub item: Item,
    /// Whether nobody confirmed it.
    pub estimated: bool,
    pub unpriced: bool,
    pub quantity: i128,
    /// In picodollars.
    pub cost: i128,
    pub list: i128,
}

impl Row {
    /// A row of nothing, for whoever wants to know what rows look like.
    pub fn nothing() -> Row {
        let (payer, item) = (Payer::default(), Item::Container);
        Row { day: 0, payer, item, estimated: false, unpriced: false, quantity: 0, cost: 0, list: 0 }
    }
}

/// What adds up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Sum {
    tokens: [i128; 5],
    searches: i128,
    nanos: i128,
    cost: i128,
    list: i128,
    unpriced: bool,
}

impl Sum {
    fn spent(tokens: Tokens, searches: u64, cost: Usd, list: Usd) -> Sum {
        Sum {
            tokens: tokens.by_kind().map(i128::from),
            searches: searches.into(),
            cost: cost.pico().into(),
            list: list.pico().into(),
            ..Sum::default()
        }
    }

    fn add(&mut self, other: Sum) {
        self.tokens.iter_mut().zip(other.tokens).for_each(|(sum, n)| *sum += n);
        self.searches += other.searches;
        self.nanos += other.nanos;
        self.cost += other.cost;
        self.list += other.list;
        self.unpriced |= other.unpriced;
    }

    fn takes_back(&self) -> bool {
        self.cost < 0 || self.tokens.iter().any(|n| *n < 0)
    }

    fn negative(self) -> Sum {
        let Sum { tokens, searches, nanos, cost, list, unpriced } = self;
        Sum { tokens: tokens.map(|n| -n), searches: -searches, nanos: -nanos, cost: -cost, list: -list, unpriced }
    }
}

/// Where a sum belongs; without a model it is the container's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Place {
    day: u32,
    payer: Payer,
    model: Option<Arc<str>>,
}

type Waiting = Vec<(Place, Sum)>;

/// See the module's head.
#[derive(Debug)]
pub struct Bill {
    by: By,
    prices: PriceTable,
    sums: HashMap<(Place, bool), Sum>,
    /// What was counted early and waits for the end of its turn, by run and session.
    unconfirmed: HashMap<(Arc<str>, Arc<str>), Waiting>,
    /// The container's time of runs whose session has no name yet.
    nameless: HashMap<Arc<str>, Waiting>,
    /// The session of a run's last line.
    current: HashMap<Arc<str>, Arc<str>>,
    /// Each text once, however many lines have it.
    texts: HashSet<Arc<str>>,
}

impl Bill {
    /// The prices only divide: what things cost is in the ledger.
    pub fn new(by: By, prices: PriceTable) -> Bill {
        Bill {
            by,
            prices,
            sums: HashMap::new(),
            unconfirmed: HashMap::new(),
            nameless: HashMap::new(),
            current: HashMap::new(),
            texts: HashSet::new(),
        }
    }

    /// Takes a line of that day; `billed` if the day is to be on the bill. Lines of a run have to come in their order.
    pub fn on(&mut self, record: &Record, day: u32, billed: bool) {
        let run = self.text(&record.run);
        let session = record.fact.session_id().filter(|id| !id.is_empty()).map(|id| self.text(id));
        if let Some(session) = &session {
            self.current.insert(Arc::clone(&run), Arc::clone(session));
            for (mut place, sum) in self.nameless.remove(&run).unwrap_or_default() {
                if self.by == By::Session {
                    place.payer.session = Some(Arc::clone(session));
                }
                self.book(place, false, sum);
            }
        }
        let session = session.or_else(|| self.current.get(&run).cloned());
        match &record.fact {
            Fact::Spent { model, basis, tokens, cost_usd, list_usd, web_searches, unpriced, .. } if billed => {
                let place = self.place(day, &record.who, session.as_ref(), Some(model));
                let sum = Sum::spent(*tokens, *web_searches, *cost_usd, list_usd.unwrap_or(*cost_usd));
                let sum = Sum { unpriced: *unpriced, ..sum };
                match basis {
                    Basis::Estimate => self.wait(run, session, place, sum),
                    Basis::Confirmed => self.book(place, false, sum),
                }
            }
            Fact::Corrected { model, cost_usd, list_usd, tokens, .. } if billed => {
                let place = self.place(day, &record.who, session.as_ref(), Some(model));
                let sum = Sum::spent(*tokens, 0, *cost_usd, list_usd.unwrap_or(*cost_usd)).negative();
                self.wait(run, session, place, sum);
            }
            Fact::ContainerUsed { seconds, cost_usd, .. } if billed => {
                let time = Duration::try_from_secs_f64(*seconds).unwrap_or_default();
                let cost = cost_usd.pico().into();
                #[expect(clippy::cast_possible_wrap, reason = "a duration is far below")]
                let sum = Sum { nanos: time.as_nanos() as i128, cost, list: cost, ..Sum::default() };
                let place = self.place(day, &record.who, session.as_ref(), None);
                let waits = self.nameless.get(&run).map_or(0, Vec::len);
                if session.is_none() && waits < NAMELESS {
                    self.nameless.entry(run).or_default().push((place, sum));
                } else {
                    self.book(place, false, sum);
                }
            }
            Fact::TurnEnded { confirmed, .. } => {
                let waited = session.and_then(|session| self.unconfirmed.remove(&(run, session)));
                for (place, sum) in waited.unwrap_or_default() {
                    self.book(place, !confirmed, sum);
                }
            }
            Fact::ProcessExited { .. } => drop(self.current.remove(&run)),
            _ => {}
        }
    }

    /// All rows, in order.
    pub fn rows(mut self) -> impl Iterator<Item = Row> {
        for (place, sum) in std::mem::take(&mut self.unconfirmed).into_values().flatten() {
            self.book(place, true, sum);
        }
        for (place, sum) in std::mem::take(&mut self.nameless).into_values().flatten() {
            self.book(place, false, sum);
        }
        let mut sums = std::mem::take(&mut self.sums);
        // What takes back an estimate of a turn that has ended belongs to the estimate.
        let over: Vec<Place> = sums
            .iter()
            .filter(|((_, estimated), sum)| !estimated && sum.takes_back())
            .map(|((place, _), _)| place.clone())
            .collect();
        for place in over {
            if let Some(sum) = sums.contains_key(&(place.clone(), true)).then(|| sums.remove(&(place.clone(), false))).flatten() {
                sums.entry((place, true)).or_default().add(sum);
            }
        }
        let mut sums: Vec<_> = sums.into_iter().collect();
        sums.sort_by(|a, b| a.0.cmp(&b.0));
        let rows = sums.into_iter().flat_map(move |((place, estimated), sum)| self.divide(&place, estimated, sum));
        rows.filter(|row| (row.quantity, row.cost, row.list) != (0, 0, 0))
    }

    fn wait(&mut self, run: Arc<str>, session: Option<Arc<str>>, place: Place, sum: Sum) {
        match session {
            None => self.book(place, true, sum),
            Some(session) => {
                let waits = self.unconfirmed.entry((run, session)).or_default();
                match waits.iter_mut().find(|(other, _)| *other == place) {
                    Some((_, other)) => other.add(sum),
                    None => waits.push((place, sum)),
                }
            }
        }
    }

    fn book(&mut self, place: Place, estimated: bool, sum: Sum) {
        self.sums.entry((place, estimated)).or_default().add(sum);
    }

    fn place(&mut self, day: u32, who: &Who, session: Option<&Arc<str>>, model: Option<&str>) -> Place {
        let payer = match self.by {
            By::Model => Payer::default(),
            By::Session | By::Tenant => Payer {
                tenant: who.tenant.as_deref().map(|text| self.text(text)),
                team: who.team.as_deref().map(|text| self.text(text)),
                cost_center: who.cost_center.as_deref().map(|text| self.text(text)),
                session: session.filter(|_| self.by == By::Session).cloned(),
            },
        };
        Place { day, payer, model: model.map(|text| self.text(text)) }
    }

    fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return Arc::clone(known);
        }
        let new: Arc<str> = text.into();
        self.texts.insert(Arc::clone(&new));
        new
    }

    fn divide(&self, place: &Place, estimated: bool, sum: Sum) -> Vec<Row> {
        let row = |item, quantity, cost, list| Row {
            day: place.day,
            payer: place.payer.clone(),
            item,
            estimated,
            unpriced: sum.unpriced,
            quantity,
            cost,
            list,
        };
        let Some(model) = &place.model else { return vec![row(Item::Container, sum.nanos, sum.cost, sum.list)] };
        // Of what nobody prices, each token is worth the same.
        let [paid, listed] = self.prices.by_kind(model, EVER).unwrap_or([[1; 5]; 2]).map(|rates| rates.map(i128::from));
        let tokens = (0..sum.tokens.len())
            .map(|kind| (Item::Tokens { model: Arc::clone(model), kind }, sum.tokens[kind], [paid[kind], listed[kind]]));
        let search = i128::from(WEB_SEARCH.pico());
        let searches = (Item::WebSearches { model: Arc::clone(model) }, sum.searches, [search; 2]);
        let parts: Vec<(Item, i128, [i128; 2])> = tokens.chain([searches]).filter(|(_, n, _)| *n != 0).collect();
        let divided = |sum: i128, list: usize| {
            let weights: Vec<i128> = parts.iter().map(|(_, n, rates)| n * rates[list]).collect();
            let free = weights.iter().all(|weight| *weight == 0);
            shares(sum, &if free { parts.iter().map(|(_, n, _)| *n).collect() } else { weights })
        };
        let (costs, lists) = (divided(sum.cost, 0), divided(sum.list, 1));
        let rest = (sum.cost - costs.iter().sum::<i128>(), sum.list - lists.iter().sum::<i128>());
        let mut rows: Vec<Row> = parts
            .into_iter()
            .zip(costs.into_iter().zip(lists))
            .map(|((item, n, _), (cost, list))| row(item, n, cost, list))
            .collect();
        if rest != (0, 0) {
            rows.push(row(Item::Rest { model: Arc::clone(model) }, 0, rest.0, rest.1));
        }
        rows
    }
}

/// A sum in parts of these weights; nothing where a part would have another sign than its weight, as no price explains that.
fn shares(sum: i128, weights: &[i128]) -> Vec<i128> {
    let whole: i128 = weights.iter().sum();
    let alike = weights.iter().all(|weight| weight.signum() * whole.signum() >= 0);
    if whole == 0 || !alike || sum.signum() * whole.signum() < 0 {
        return vec![0; weights.len()];
    }
    // Where the product does not fit, all goes to the largest.
    let part = |weight: &i128| sum.checked_mul(*weight).map_or(0, |product| product / whole);
    let mut parts: Vec<i128> = weights.iter().map(part).collect();
    let left = sum - parts.iter().sum::<i128>();
    if let Some(largest) = (0..weights.len()).max_by_key(|at| weights[*at].abs()) {
        parts[largest] += left;
    }
    parts
}
