"""The bill that finance makes, held against what others have written: the FinOps Foundation's validator, and DuckDB for Parquet."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from decimal import Decimal
from pathlib import Path

import pytest
from test_alerts import RECORDINGS, ROOT, binary

PYTHON = ROOT / ".cache/bill/venv/bin/python"
# The validator has other names for four columns than the specification that it is for.
SPELT = {"InvoiceIssuerName": "InvoiceIssuer", "ProviderName": "Provider", "PublisherName": "Publisher", "ResourceId": "ResourceID"}
# Columns that the specification wants where there are regions and commitments to tell of.
CONDITIONAL = [*(f"CommitmentDiscount{what}" for what in ["Category", "Id", "Name", "Status", "Type"]), "RegionId", "RegionName"]
EXCUSED = {
    **{f"{name}_Required": "it is called otherwise in the specification" for name in SPELT.values()},
    **{f"{name}_Required": "there is none, and then the column need not be" for name in CONDITIONAL},
    "BillingCurrency_IsCurrencyCode": "its list of currencies has to be downloaded first",
    "SkuPriceId_Nullable": "it asks for ChargeType, which has been ChargeCategory since 1.0",
}
# One tenant is a number to whoever guesses at types.
RUNS = [("0042", "05a_subagent"), ("acme", "04j_kill9"), ("acme", "01_basic_text")]


@pytest.fixture(scope="module")
def bill(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("bill")
    books = directory / "books"
    books.mkdir()
    for tenant, recording in RUNS:
        run = [binary(), "run", "--listen", "off", "--hub", "off", "--ledger", books / f"{recording}.jsonl", "--tenant", tenant, "--quiet", "--"]
        agent = ["sh", "-c", 'cat "$0"', RECORDINGS / f"{recording}.jsonl", "--output-format=stream-json"]
        subprocess.run([*run, *agent], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True, timeout=60)
    subprocess.run([binary(), "bill", books, "--strict", "--output", directory / "november.csv"], check=True, timeout=60)
    return directory / "november.csv"


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


def altered(bill: Path, name: str, change) -> Path:
    """The same bill with other names or values; `change` makes a row of a row."""
    made = [change(row) for row in rows(bill)]
    with (bill.parent / f"{name}.csv").open("w", newline="") as text:
        writer = csv.DictWriter(text, list(made[0]))
        writer.writeheader()
        writer.writerows(made)
    return bill.parent / f"{name}.csv"


def as_it_likes(row: dict[str, str]) -> dict[str, str]:
    return {SPELT.get(name, name): value for name, value in row.items()} | {"ChargeType": row["ChargeCategory"]} | dict.fromkeys(CONDITIONAL, "")


BREAKS = {
    "BilledCost_IsDecimal": {"BilledCost": "a lot"},
    "BillingCurrency_IsCurrencyCode": {"BillingCurrency": "US Dollars"},
    "ChargePeriodStart_IsDateTime": {"ChargePeriodStart": "yesterday"},
    "ServiceCategory_Enum": {"ServiceCategory": "Agents"},
    "PricingCategory_Enum_1.0": {"PricingCategory": "Usual"},
    "SkuPriceId_Nullable": {"SkuPriceId": ""},
    "Tags_IsJSONObject": {"Tags": "team=a"},
    "Provider_NotNull": {"Provider": ""},
}


@pytest.fixture(scope="module")
def said(bill: Path) -> dict[str, list[str]]:
    """Of all of them at once: it takes seconds to begin."""
    # Where it looks for currencies.
    codes = bill.parent / "focus_validator/utils/currency_codes.csv"
    files = {"ours": bill, "liked": altered(bill, "liked", as_it_likes)}
    files |= {rule: altered(bill, rule, lambda row, broken=broken: as_it_likes(row) | broken) for rule, broken in BREAKS.items()}

    def ask(**files: Path) -> dict[str, list[str]]:
        done = subprocess.run([PYTHON, Path(__file__).parent / "focus.py", *files.values()], cwd=bill.parent, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return dict(zip(files, json.loads(done.stdout).values()))

    first = ask(ours=files.pop("ours"))
    codes.parent.mkdir(parents=True)
    codes.write_text("currency_codes\nUSD\nEUR\n")
    return first | ask(**files)


def test_the_validator_finds_nothing_that_it_is_right_about(said):
    assert set(said["ours"]) == set(EXCUSED)


def test_it_finds_nothing_at_all_once_that_is_put_its_way(said):
    assert said["liked"] == []


@pytest.mark.parametrize("rule", BREAKS)
def test_and_it_would_find(rule: str, said):
    assert rule in said[rule]


def test_the_line_of_duckdb_makes_parquet_with_decimals(bill: Path):
    [sql] = re.findall(r"^```sql\n(.*?)^```$", (ROOT / "docs/for-finance.md").read_text(), re.MULTILINE | re.DOTALL)
    ask = """
import duckdb, json, sys
duckdb.sql(sys.stdin.read())
types = {name: type for name, type, *_ in duckdb.sql("DESCRIBE FROM 'november.parquet'").fetchall()}
read = duckdb.sql("FROM 'november.parquet'")
print(json.dumps([types, [dict(zip(read.columns, map(lambda value: None if value is None else str(value), row))) for row in read.fetchall()]]))"""
    done = subprocess.run([PYTHON, "-c", ask], cwd=bill.parent, input=sql, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    types, read = json.loads(done.stdout)
    whole = rows(bill)
    assert list(types) == list(whole[0]) and len(read) == len(whole)
    for name, type in types.items():
        numbers = name.endswith(("Cost", "Quantity", "Price"))
        wanted = "DECIMAL" if numbers else "BOOLEAN" if name in {"x_CostEstimated", "x_Unpriced"} else "TIMESTAMP WITH TIME ZONE" if "Period" in name else "VARCHAR"
        assert type.startswith(wanted), f"{name} is {type}"
        for out, was in zip(read, whole):
            if numbers:
                assert Decimal(out[name] or 0) == Decimal(was[name] or 0), (name, out[name], was[name])
            elif wanted == "VARCHAR":
                assert (out[name] or "") == was[name]
    assert {row["SubAccountId"] for row in read} == {"0042", "acme"}
