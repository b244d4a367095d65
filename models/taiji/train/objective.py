"""What the loop asks an objective: its turns, what each trains, and to recompute activations."""

from typing import Any

from torch import nn


def turns_of(objective: nn.Module) -> tuple[str, ...]:
    """The turns of an adversarial objective, in order; one nameless turn of any other."""
    turns: tuple[str, ...] = tuple(getattr(objective, "turns", ("",)))
    return turns


def parameter_groups(objective: nn.Module, turn: str) -> list[dict[str, Any]]:
    """What one turn's optimiser updates: groups of "params" with an "lr_scale" each.

    Raises ValueError when a trainable parameter is in no turn or group: it would never move.
    """
    trainable = [p for p in objective.parameters() if p.requires_grad]
    grouped: Any = getattr(objective, "parameter_groups", None)
    split: Any = getattr(objective, "parameters_of", None)
    if grouped is not None and split is not None:
        raise ValueError("an objective has parameters_of (turns) or parameter_groups, not both")
    if grouped is not None:
        groups = [{"lr_scale": 1.0, **g, "params": list(g["params"])} for g in grouped()]
        reached = {id(p) for group in groups for p in group["params"]}
    elif split is not None:
        scales: dict[str, float] = getattr(objective, "lr_scales", {})
        groups = [{"params": list(split(turn)), "lr_scale": scales.get(turn, 1.0)}]
        reached = {id(p) for name in turns_of(objective) for p in split(name)}
    else:
        return [{"params": trainable, "lr_scale": 1.0}]
    lost = [n for n, p in objective.named_parameters() if p.requires_grad and id(p) not in reached]
    if lost:
        raise ValueError(f"no turn or group trains {lost[:3]}: add them, or requires_grad_(False)")
    return groups


def enable_gradient_checkpointing(objective: nn.Module) -> None:
    """Recomputes activations in the backward pass of every trained part that can.

    Raises ValueError where no part can.
    """
    enabled = 0
    for module in objective.modules():
        if not any(p.requires_grad for p in module.parameters()):
            continue
        # as diffusers calls it, and transformers
        for name in ("enable_gradient_checkpointing", "gradient_checkpointing_enable"):
            method = getattr(module, name, None)
            # diffusers has the method on every model, and raises where it cannot
            if method is not None and getattr(module, "_supports_gradient_checkpointing", True):
                method()
                enabled += 1
                break
    if not enabled:
        raise ValueError(
            "gradient_checkpointing: no trained part supports it; leave it out of the recipe"
        )
