"""From facts to a card: what people declared, templates, and the check that metadata reads back."""

from collections.abc import Iterator
from typing import Any, TypeVar

import jinja2
import yaml
from huggingface_hub import RepoCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from hub_cards.evaluations import compare, estimate
from hub_cards.facts import CardError, Fact, Facts, derive, figures, get, marked, settle, value

TEXTS = {"name", "license", "language", "base_model", "datasets", "recipe", "notes"}
DECLARED = TEXTS | {"sources", "evaluations"}
"""What `card.yaml` may have."""
Card = TypeVar("Card", bound=RepoCard)


def declared_facts(facts: Facts) -> Fact | None:
    """`card.yaml`, if there is one.

    Raises:
        CardError: it has what no card shows, or something else where text belongs.
    """
    declared = facts.optional("card.yaml")
    if declared is None:
        return None
    if not isinstance(value(declared), dict):
        raise CardError(f"card.yaml has no keys; it may have {', '.join(sorted(DECLARED))}.")
    if unknown := value(declared).keys() - DECLARED:
        raise CardError(f"card.yaml has {', '.join(sorted(unknown))}; it may have {', '.join(sorted(DECLARED))}.")
    for key in TEXTS & value(declared).keys():
        texts = value(declared[key])
        if not all(isinstance(text, str) for text in (texts if isinstance(texts, list) else [texts])):
            raise CardError(f'"{key}" of card.yaml is not text: put it in quotes, as "no" for Norwegian.')
    return declared


def _prose(fact: Fact) -> str:
    """What people wrote, which is no source of figures."""
    text = str(value(fact)).strip()
    if found := figures(text):
        raise CardError(f"card.yaml has figures ({', '.join(found)}) in {text!r}: leave them to the files of runs.")
    return text


def _figure(fact: Fact, form: str = "", per: float = 1) -> str:
    """A number in a format of Python's, in units of `per`."""
    return marked(fact, lambda number: format(number / per if per != 1 else number, form))


def _pairs(fact: Fact) -> Iterator[tuple[Fact, Fact]]:
    return ((key, fact[value(key)]) for key in fact)


def render(template: str, **context: Any) -> str:
    """A template with facts, and no figure but theirs.

    Raises:
        CardError: a fact is missing, or there is a figure that is none.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hub_cards"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "arrow": lambda score: {True: "↑", False: "↓", None: ""}[value(score.higher_is_better)],
        "compare": compare,
        "estimate": lambda score: marked(derive(estimate(value(score)), score)),
        "figure": _figure,
        "get": get,
        "numbered": lambda facts: ((derive(number, facts), fact) for number, fact in enumerate(facts, 1)),
        "pairs": _pairs,
        "prose": _prose,
        "value": value,
        "yaml": lambda fact: marked(derive(yaml.safe_dump(value(fact), sort_keys=False).strip(), fact)),
    }
    return settle(environment.get_template(template).render(context)).strip() + "\n"


def checked(card: Card) -> Card:
    """The card, if its metadata reads back as it is, results among it.

    Raises:
        CardError: it does not.
    """
    data = card.data.to_dict()
    try:
        index = data.get("model-index")
        results = index and eval_results_to_model_index(*model_index_to_eval_results(index))
        same = results == index and type(card)(str(card)).data.to_dict() == data
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise CardError(f"The card's metadata cannot be read back: {error}") from error
    if not same:
        raise CardError("The card's metadata changes on the way through the library that reads it.")
    return card
