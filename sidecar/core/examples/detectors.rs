//! Renews the measured part of docs/detectors.md: the page comes in and goes out.

#[path = "../tests/detectors/corpus.rs"]
mod corpus;
#[path = "../tests/detectors/stage.rs"]
mod stage;
#[path = "../tests/detectors/table.rs"]
mod table;

fn main() -> std::io::Result<()> {
    let page = std::io::read_to_string(std::io::stdin())?;
    std::io::Write::write_all(&mut std::io::stdout(), table::renewed(&page).as_bytes())
}
