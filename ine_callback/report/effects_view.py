"""Causal effects as views of a report need them: tables, words, comparison. Imports them where a report has some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ine_callback.report.effects_plot import drawings, image
from ine_callback.scores import Attribution
from ine_callback.utilities.words import number, probability, signed

if TYPE_CHECKING:
    from ine_callback.effects.reported import Effects

METHOD = "effects"  # its name in reports; the rest is imported at need
Tables = list[tuple[list[str], list[list[str]]]]


def is_effects(found: Attribution) -> bool:
    """Whether an attribution holds causal effects that can be read back."""
    if found.method != METHOD:
        return False
    from ine_callback.effects.reported import holds_effects

    return holds_effects(found)


def _of(found: Attribution) -> Effects:
    from ine_callback.effects.reported import Effects

    return Effects(found)


def effects_in(attributions: Sequence[Attribution]) -> Effects:
    """The effects of a report.

    Raises:
        InfluenceError: If there are none.
    """
    from ine_callback.effects.reported import effects_of

    return effects_of(next((each for each in reversed(attributions) if each.method == METHOD), None))


def effects_text(found: Attribution) -> str:
    """As a terminal shows them."""
    return str(_of(found))


def effects_tables(found: Attribution) -> Tables:
    """Heads and lines: estimates, and effects along paths."""
    effects, tables = _of(found), []
    if effects.found:
        head = ["effect", "estimate", "± se", "95 % interval", "p", "adjusted for", "smallest n_eff", "imbalance"]
        tables.append((head, [_line(one) for one in effects.found]))
    if effects.edges:
        head = ["path", "stability", "effect", "± se", "over all graphs", "by", "n_eff", "imbalance"]
        tables.append((head, [_path(one) for one in effects.paths]))
    return tables


def _line(one: Any) -> list[str]:
    low, high = one.interval()
    return [
        one.name,
        signed(one.estimate, 3),
        number(one.standard_error, 3),
        f"{signed(low, 3)} to {signed(high, 3)}",
        probability(one.p),
        " and ".join("{" + ", ".join(each) + "}" for each in one.adjustment),
        number(one.positivity.smallest, 0),
        number(max(one.positivity.imbalance.values()), 2),
    ]


def _path(one: Any) -> list[str]:
    error = f" ± {number(one.stability_error, 2)}" if one.stability_error else ""
    return [
        one.name,
        number(one.stability, 2) + error,
        signed(one.effect, 3),
        number(one.standard_error, 3),
        signed(one.averaged[0], 3),
        one.by,
        number(one.effective_size, 0),
        number(one.imbalance, 2),
    ]


def effects_words(found: Attribution) -> list[tuple[str, list[str]]]:
    """Of each effect its name, and what it rests on in words."""
    from ine_callback.effects.effect import words

    effects = _of(found)
    each = [(one.name, [line.strip(" -") for line in words(one, effects.rows)[1:] if line]) for one in effects.found]
    return each + ([("the paths", _of_paths(effects))] if effects.edges else [])


def effects_assumptions(found: Attribution) -> list[str]:
    """The same as one list, each line once."""
    return [f"{name}: {line}" for name, lines in effects_words(found) for line in lines]


def _of_paths(effects: Effects) -> list[str]:
    flow = ["Stabilities are by a flow, and not calibrated."] if effects.flow else []
    tau = 0.0 if effects.tau is None else effects.tau
    words = f"Paths of stability {tau:g} or more, given the order of the tiers; a path chosen for being stable may look"
    return [*flow, f"{words} stronger than it is."]


def effects_section(found: Attribution) -> dict[str, Any]:
    """What the page shows of them."""
    effects = _of(found)
    drawn = drawings(effects)
    alt = "Causal graph: " + "; ".join(f"{u} to {v}" for one in drawn for u, v in one.edges)
    return {
        "tables": effects_tables(found),
        "words": effects_words(found),
        "image": image(drawn) if drawn else "",
        "alt": alt,
    }


def effects_compared(one: Sequence[Attribution], other: Sequence[Attribution]) -> list[str]:
    """How the same effects differ between two reports, in words."""
    here, there = ([each for each in found if is_effects(each)][-1:] for found in (one, other))
    if not here or not there:
        return []
    from ine_callback.effects.reported import compared

    return compared(_of(here[0]), _of(there[0]))
