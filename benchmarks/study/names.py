"""What the arms of the tables are called: from the fields that a run changes to what the field calls it."""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]  # dotted field: value
STARTS = {"material/student-skewed": "skewed start", "material/student-even": "even start"}
RULES = {"ddk": "DDK", "ddk_unsmoothed": "DDK unsmoothed"}
LEFT_OUT = {
    "distill.alpha": "alpha",
    "distill.interval_steps": "K",
    "distill.gamma": "gamma",
    "distill.temperature": "T",
}
NEARLY_KL_ALONE = 100  # gamma from which CE hardly counts


def start_of(settings: Settings) -> str:
    """Where a run's student starts; takes the fields that say so out of `settings`."""
    layers = settings.pop("student.keep_layers", None)
    if layers is not None:
        return f"{len(layers)} layers of the teacher"
    return STARTS[settings.pop("student.model", "material/student-skewed")]


def of_mixing(settings: Settings) -> str:
    """KD or CPT under a static mix, or a rule and its options."""
    left = {field.removeprefix("distill."): value for field, value in settings.items()}
    rule, gamma = str(left.pop("mixing")), left.pop("gamma", 0.2)
    name = RULES.get(rule, rule)
    if rule in ("natural", "uniform"):
        loss = "CPT" if gamma == 0 else "reverse KL" if left.pop("direction", "") == "reverse" else "KD"
        name = f"{loss} {rule}"
    if left.pop("targets", "cache") == "online":
        name += " (online)"
    options = {**left.pop("mixing_options", {}), **left}
    return ", ".join([name, *(f"{option.replace('_', ' ')} {value}" for option, value in options.items())])


def of_left_out(settings: Settings) -> str:
    """The one field that is not as the paper has it."""
    for field, name in LEFT_OUT.items():
        if field in settings:
            value = settings[field]
            return (
                "KL alone" if field == "distill.gamma" and value >= NEARLY_KL_ALONE else f"{name} {value:g}"
            )
    return "alpha 0.5, K 20, gamma 0.2, T 1"


def of_targets(settings: Settings) -> str:
    """What a student is trained on."""
    scheme, tau = settings.get("cache.scheme", "pps"), settings.get("cache.tau", 0.02)
    renormalised = settings.get("distill.tail") == "renormalise"
    if settings.get("distill.targets") == "online":
        return "dense, online"
    return {
        "pps": f"pps, tau {tau:g}",
        "threshold": f"threshold {tau:g}",
        "random": f"random, N = {settings.get('cache.draws')}",
        "topk": f"top-{settings.get('cache.k')}" + (", renormalised" if renormalised else " + bucket"),
    }[scheme]


def of_skipping(settings: Settings) -> str:
    threshold = settings.get("distill.gradient_skip")
    return "exact" if threshold is None else f"gradient_skip {threshold:g}"
