"""What the FinOps Foundation's validator says of the files that it is given: as JSON, the rules that each of them breaks. Run by .cache/bill/venv."""

import json
import sys

import numpy

# Its pandera is older than the second NumPy, which is the only one that the newest Pythons have.
for name, now in {"string_": numpy.bytes_, "unicode_": numpy.str_, "float_": numpy.float64, "complex_": numpy.complex128}.items():
    if not hasattr(numpy, name):
        setattr(numpy, name, now)

from focus_validator.data_loaders.data_loader import DataLoader  # noqa: E402
from focus_validator.rules.spec_rules import SpecRules  # noqa: E402
from focus_validator.validator import DEFAULT_VERSION_SETS_PATH  # noqa: E402


def broken(file: str) -> list[str]:
    rules = SpecRules(override_filename=None, rule_set_path=DEFAULT_VERSION_SETS_PATH, rules_version="1.0", column_namespace="x")
    rules.load()
    checked = rules.validate(DataLoader(file).load()).checklist
    assert len(checked) > 100, "there are no rules"
    assert {check.status.value for check in checked.values()} <= {"passed", "failed"}
    return sorted(name for name, check in checked.items() if check.status.value == "failed")


print(json.dumps({file: broken(file) for file in sys.argv[1:]}))
