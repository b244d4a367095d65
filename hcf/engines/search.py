"""The sensitivity search: a model in, a recipe out that says which layers to quantise to what.

1. calibration (shared cache); the way to choose activation ranges that is best with the default
   rules; scales of every layer in every format
2. error of each layer and format alone           hcf.quantize.sensitivity
3. cost of each on the target engine              hcf.engines.layer_cost
4. integer program, Pareto front                  hcf.quantize.sensitivity_choice
5. on OpenVINO the whole graph is timed in turns with that of the default rules, and the program
   solved again with what it took too long or had to spare
6. moves judged by the true error on held-out calls

Beside the recipe `<stem>.yaml`: `<stem>.layers.jsonl` (every measurement, which a search that was
killed goes on from), `<stem>.pareto.json` and `<stem>.pareto.png`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn

from hcf.artifact import save_text
from hcf.engines.timing import torch_threads
from hcf.engines.trial import Trial, latencies, measure_costs, open_trial, quantize_config
from hcf.errors import RecipeError
from hcf.quantize.presets import choose as choose_by_rules
from hcf.quantize.quantize import refuse_quantised, refuse_quantised_modules
from hcf.quantize.sensitivity import LayerSensitivity, measure_errors, shared_inputs, summarise
from hcf.quantize.sensitivity_choice import (
    FLOATING,
    Choice,
    Option,
    choose,
    cost_of,
    draw_front,
    exchange,
    layer_formats,
    pareto,
    predicted_error,
    write_front,
)
from hcf.quantize.statistics import bucket_edges
from hcf.settings import QuantizeConfig, SensitivityConfig
from hcf.source import open_pipeline

Log = Callable[[str], None]
SOLVES = 6  # times the program is solved to meet a measured latency
BISECTIONS = 6  # of the predicted error that gives the true one asked for
SAME_SPEED = 1.01  # measured ratios up to this times the target count as reached
COST_UNITS = {"openvino": "ms", "tensorrt": "ms", "macs": "byte times"}
# settings that the recipe takes over, so that it calibrates as the search did
KEPT = ("component", "calibration_samples", "calibration_calls", "calibration_steps",
        "calibration_guidance", "batch_size", "height", "width", "seed")  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A choice, its true error on held-out calls, and its latency over the default's (measured)."""

    choice: Choice
    error: float
    ratio: float | None


def search(model: Path, output: Path, config: SensitivityConfig, log: Log = print) -> Path:
    """Writes the recipe `output` (.yaml) for `model`, a folder that is not quantised.

    Raises RecipeError where the target cannot be reached, or is by floating point alone, or
    `output` is no .yaml; HcfError for a quantised model or where memory will not do;
    MissingDependency where the target is not here.
    """
    if output.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"{output} is no recipe", fix="name the output recipe.yaml")
    refuse_quantised(model / config.component)
    output.parent.mkdir(parents=True, exist_ok=True)
    pipe = open_pipeline(model)
    denoiser: nn.Module = getattr(pipe, config.component)
    refuse_quantised_modules(denoiser, config.component)
    with (
        torch_threads(config.threads or torch.get_num_threads()),
        _folder_beside(output) as folder,
        open_trial(pipe, model, config, folder, log) as trial,
    ):
        rows = measure_errors(
            denoiser, trial.scales, trial.calls, output.with_suffix(".layers.jsonl"),
            content=trial.content, mode=config.mode, log=log,
        )  # fmt: skip
        errors = summarise(rows, bucket_edges(trial.calls, config.timestep_buckets))
        costs = measure_costs(trial, config, log)
        groups = shared_inputs(denoiser, list(costs[FLOATING]), trial.calls[0])
        options = make_options(groups, errors, costs)
        default = default_choice(options, default_formats(denoiser, config))
        log(
            f"sensitivity: default rules: cost {cost_of(default):.3f} {COST_UNITS[config.target]}, "
            f"predicted error {predicted_error(default):.5f}"
        )
        if config.max_error is not None:
            found = _within_error(trial, options, default, config, log)
        else:
            found = _within_latency(trial, options, default, config, log)
        if set(layer_formats(found.choice).values()) == {FLOATING}:
            raise RecipeError(
                f"floating point meets the target on {config.target}, so nothing is quantised",
                fix="ask for less latency or allow more error, or leave `hcf quantize` out",
            )
        default_error = trial.default_error()
        _write_front(output, config, options, found, default, default_error, errors)
        rules = recipe_rules(found.choice, errors, COST_UNITS[config.target])
        text = recipe_text(model, output, config, trial.settings, rules, found, default_error)
        save_text(output, text)
    log(
        f"sensitivity: {output}: true error {found.error:.5f} (default rules "
        f"{default_error:.5f}), {dict(Counter(layer_formats(found.choice).values()))}"
        + (f", latency ratio {found.ratio:.3f}" if found.ratio is not None else "")
    )
    return output


def make_options(
    groups: Sequence[tuple[str, ...]],
    errors: Sequence[LayerSensitivity],
    costs: Mapping[str, Mapping[str, float]],
) -> list[Option]:
    """Every format of every group: squared errors and costs of its layers added up."""
    error = {(row.layer, row.format): row.error for row in errors}
    return [
        Option(
            group,
            format,
            sum(error.get((layer, format), 0.0) ** 2 for layer in group) ** 0.5,
            sum(each[layer] for layer in group),
        )
        for group in groups
        for format, each in costs.items()
    ]


def default_formats(denoiser: nn.Module, config: SensitivityConfig) -> dict[str, str]:
    """What `hcf quantize` does with this model in the first format when no rule is given."""
    choice = choose_by_rules(denoiser, quantize_config(config), lambda line: None)
    return {**dict.fromkeys(choice.excluded, FLOATING), **choice.formats}


def default_choice(
    options: Sequence[Option], formats: Mapping[str, str]
) -> dict[tuple[str, ...], Option]:
    """`formats` as options. A format that is no option of its group counts as the first format."""
    by_group: dict[tuple[str, ...], list[Option]] = {}
    for option in options:
        by_group.setdefault(option.layers, []).append(option)
    found: dict[tuple[str, ...], Option] = {}
    for layers, each in by_group.items():
        quantised = next((o for o in each if o.format != FLOATING), each[0])
        found[layers] = next((o for o in each if o.format == formats[layers[0]]), quantised)
    return found


def _within_latency(
    trial: Trial, options: Sequence[Option], default: Choice, config: SensitivityConfig, log: Log
) -> Found:
    """The least error at `latency_ratio` of the default rules' latency."""
    target = config.latency_ratio or 1.0
    budget = target * cost_of(default)

    def moved(choice: Choice) -> tuple[dict[tuple[str, ...], Option], float]:
        return exchange(
            options, choice, trial.true_error, budget=max(budget, cost_of(choice)),
            rounds=config.exchange_rounds, log=log,
        )  # fmt: skip

    if config.target != "openvino":  # nothing measures the whole: the costs have to do
        return Found(*moved(choose(options, budget=budget)), None)
    cheapest = sum(min(o.cost for o in options if o.layers == layers) for layers in default)
    found: list[Found] = []
    if target >= 1:  # the default rules keep the target: nothing that is worse is taken
        found.append(Found(default, trial.true_error(layer_formats(default)), 1.0))
    below: tuple[float, float] | None = None  # (budget, ratio) of the last that kept the target
    above: tuple[float, float] | None = None
    for _ in range(SOLVES):
        choice = choose(options, budget=budget)
        ratio, base = _ratio(trial, choice, default, config)
        error = trial.true_error(layer_formats(choice))
        log(
            f"sensitivity: cost {cost_of(choice):.3f} of {budget:.3f} ms: true error {error:.5f}, "
            f"{ratio:.3f} of the default rules' {base:.2f} ms"
        )
        if ratio <= target * SAME_SPEED:
            found.append(Found(choice, error, ratio))
            below = budget, ratio
        else:
            above = budget, ratio
        if below and above and below[0] < above[0] and below[1] < above[1]:
            share = (target - below[1]) / (above[1] - below[1])
            budget = below[0] + min(max(share, 0.1), 0.9) * (above[0] - below[0])
        else:
            # what the whole took too long, or had to spare, is in the unit of the costs
            budget += (target - ratio) * base
        budget = max(budget, cheapest * (1 + 1e-9))
    if not found:
        raise RecipeError(
            f"no choice was found that measures at most {target:.3f} of the default's latency; "
            f"the last took {ratio:.3f}",
            fix="raise the latency ratio",
        )
    best = min(found, key=lambda each: each.error)
    budget = cost_of(best.choice)
    choice, error = moved(best.choice)
    if choice == best.choice:
        return best
    ratio, _ = _ratio(trial, choice, default, config)
    log(f"sensitivity: after the exchange: true error {error:.5f}, latency ratio {ratio:.3f}")
    return Found(choice, error, ratio) if ratio <= target * SAME_SPEED else best


def _within_error(
    trial: Trial, options: Sequence[Option], default: Choice, config: SensitivityConfig, log: Log
) -> Found:
    """The cheapest choice found whose true error keeps the bound; the predicted one is bisected.

    RecipeError where there is none.
    """
    assert config.max_error is not None
    best: dict[tuple[str, ...], Option] | None = None
    low, high = 0.0, 2 * config.max_error
    for _ in range(BISECTIONS):
        choice = choose(options, max_error=(low + high) / 2)
        error = trial.true_error(layer_formats(choice))
        log(f"sensitivity: predicted error {predicted_error(choice):.5f}, true error {error:.5f}")
        if error <= config.max_error:
            best, low = dict(choice), (low + high) / 2
        else:
            high = (low + high) / 2
    if best is None:
        raise RecipeError(
            f"no choice was found with a true error of at most {config.max_error}; the last had "
            f"{error:.5f}",
            fix="raise max_error, or offer more exact formats",
        )
    improved, error = exchange(
        options, best, trial.true_error, budget=cost_of(best),
        rounds=config.exchange_rounds, log=log,
    )  # fmt: skip
    measured = config.target == "openvino"
    ratio = _ratio(trial, improved, default, config)[0] if measured else None
    return Found(improved, error, ratio)


def _ratio(
    trial: Trial, choice: Choice, default: Choice, config: SensitivityConfig
) -> tuple[float, float]:
    """Latency of the whole graph over that of the default rules, and theirs in ms."""
    formats = [layer_formats(default), layer_formats(choice)]
    base, own = latencies(trial, formats, config.repeats)
    return own / base, base


def recipe_rules(
    choice: Choice, errors: Sequence[LayerSensitivity], unit: str
) -> list[dict[str, str]]:
    """`rules` of a `quantize:` section: the commonest format for all, then a rule a layer else."""
    common = Counter(layer_formats(choice).values()).most_common(1)[0][0]
    alone: dict[str, float] = {}
    for row in errors:
        alone[row.layer] = max(row.error, alone.get(row.layer, 0.0))
    rules = [{"pattern": "*", "format": common, "reason": "sensitivity search: the commonest"}]
    for option in choice.values():
        if option.format == common:
            continue
        for layer in option.layers:
            reason = f"sensitivity search: error {alone.get(layer, 0.0):.2e} when quantised alone"
            if len(option.layers) == 1:
                reason += f", {option.cost:.3g} {unit} as it is"
            rules.append({"pattern": layer, "format": option.format, "reason": reason})
    return rules


def recipe_text(
    model: Path,
    output: Path,
    config: SensitivityConfig,
    settings: QuantizeConfig,
    rules: Sequence[Mapping[str, str]],
    found: Found,
    default_error: float,
) -> str:
    """The recipe as YAML, with what it reached at its head."""
    tree = {name: getattr(config, name) for name in KEPT if name in config.model_fields_set}
    if prompts := config.calibration_prompts:
        tree["calibration_prompts"] = str(prompts) if isinstance(prompts, Path) else prompts
    tree["algorithm"] = settings.algorithm
    if settings.algorithm == "percentile":
        tree["percentile"] = settings.percentile
    tree |= {"format": config.formats[0], "rules": [dict(rule) for rule in rules]}
    QuantizeConfig.model_validate(tree)
    ratio = f", latency {found.ratio:.3f} of theirs" if found.ratio is not None else ""
    return (
        f"# Formats of {model.resolve().name} by sensitivity search on {config.target}.\n"
        f"#   hcf quantize -m MODEL -o OUTPUT --recipe {output.name}\n"
        f"# relative error {found.error:.5f} on held-out calls (default rules "
        f"{default_error:.5f}){ratio}\n"
        + yaml.safe_dump({"quantize": tree}, allow_unicode=True, sort_keys=False)
    )


def _write_front(
    output: Path,
    config: SensitivityConfig,
    options: Sequence[Option],
    found: Found,
    default: Choice,
    default_error: float,
    errors: Sequence[LayerSensitivity],
) -> None:
    unit, front = COST_UNITS[config.target], pareto(options)
    costs = {(layer, o.format): o.cost for o in options for layer in o.layers[:1]}
    tree = {
        "target": config.target,
        "unit": unit,
        "mode": config.mode,
        "chosen": {"cost": cost_of(found.choice), "predicted_error": predicted_error(found.choice),
                   "true_error": found.error, "latency_ratio": found.ratio},
        "default": {"cost": cost_of(default), "predicted_error": predicted_error(default),
                    "true_error": default_error},
        "layers": [
            {**vars(row), "by_bucket": list(row.by_bucket),
             "group_cost": costs.get((row.layer, row.format))}
            for row in errors
        ],
    }  # fmt: skip
    write_front(front, tree, output.with_suffix(".pareto.json"))
    marks = {
        "default rules": (cost_of(default), predicted_error(default)),
        "chosen": (cost_of(found.choice), predicted_error(found.choice)),
    }
    draw_front(front, marks, unit, output.with_suffix(".pareto.png"))


@contextmanager
def _folder_beside(output: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f".hcf-{os.getpid()}-", dir=output.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
