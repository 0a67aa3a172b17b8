"""The command line: what is chosen, and what is refused."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from bench.__main__ import chosen_targets, main, read_variants
from bench.targets import Inferno


def test_a_variant_is_inferno_with_further_settings():
    variants = read_variants(
        [
            "safe:INFERNO_REDIS__FSYNC=always",
            "safe:INFERNO_SERVER__PROCESSES=1",
            "own:INFERNO_REDIS__FSYNC=no",
        ]
    )
    targets = chosen_targets(
        ["inferno", "flask"], {"INFERNO_SERVER__PROCESSES": "4"}, variants, flower=False
    )
    assert [target.name for target in targets] == [
        "inferno",
        "inferno/safe",
        "inferno/own",
        "flask",
    ]
    plain, safe, own = (target for target in targets if isinstance(target, Inferno))
    assert plain.env == {"INFERNO_SERVER__PROCESSES": "4"}
    assert safe.env == {"INFERNO_SERVER__PROCESSES": "1", "INFERNO_REDIS__FSYNC": "always"}
    assert own.env == {"INFERNO_SERVER__PROCESSES": "4", "INFERNO_REDIS__FSYNC": "no"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--targets", "inferno,triton"], "'triton': expected one of inferno, flask"),
        (["--workloads", "chess"], "'chess': expected one of echo, simulated"),
        (["--connections", "1,many"], "expected numbers such as 1,64"),
        (["--connections", "0"], "expected numbers such as 1,64"),
        (["--env", "REDIS__FSYNC=no"], "expected INFERNO_GROUP__FIELD=VALUE"),
        (["--variant", "safe"], "expected LABEL:INFERNO_GROUP__FIELD=VALUE"),
        (["--env", "INFERNO_REDIS__FSINK=no"], "INFERNO_REDIS__FSINK is not a setting"),
        (["--variant", "x:INFERNO_TASKS__EVENTS=no"], "INFERNO_TASKS__EVENTS is not a setting"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_starts(arguments, reason):
    result = CliRunner().invoke(main, ["run", *arguments], terminal_width=200)
    assert result.exit_code == 2
    assert reason in result.output
