"""What is compared on what: heads of real models, lengths, layouts, precisions, budgets, and toys.

Every size hangs on `rows`, the N of a typical point, so that a CPU and a GPU get problems that fill them.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.problem import Setting

HEADS = {  # V, D
    "SmolLM2-135M": (49152, 576),
    "Qwen3-0.6B": (151936, 1024),
    "Gemma-3-1B": (262144, 1152),
    "Llama-3-8B": (128256, 4096),
}
# For curves and variants, where all contestants would take an hour: ours, what people write, and the best of each kind.
FEW = ("fused", "plain torch", "torch linear CE, budget", "TRL fused head", "Liger DPO")


class Scenario(NamedTuple):
    """points: a label and a setting each. contestants: their names; None is all. axis: what a curve is drawn along."""

    name: str
    says: str
    points: dict[str, Setting]
    contestants: tuple[str, ...] | None = FEW
    axis: str | None = None


def pairs(model: str, rows: int, **more) -> Setting:
    """One DPO pair with `rows` counted tokens behind a prompt as long as the response."""
    vocabulary, width = HEADS[model]
    return Setting(vocabulary, width, response=rows // 2, prompt=rows // 2, **more)


def full(rows: int) -> dict[str, Scenario]:
    few = max(16, rows // 16)
    smol = "SmolLM2-135M"
    softcapped = pairs("Gemma-3-1B", few, softcap=30.0)
    points = {
        "heads": {
            smol: pairs(smol, 2 * rows),
            "Qwen3-0.6B": pairs("Qwen3-0.6B", rows // 2),
            "Gemma-3-1B": pairs("Gemma-3-1B", rows // 4),
            "Llama-3-8B": pairs("Llama-3-8B", rows // 8),
        },
        "kinds": {head: pairs(smol, rows, head=head) for head in ("trained", "frozen", "lora", "no_grad")},
        "layouts": {
            "DPO pair": pairs(smol, rows),
            "WRPO triple": triples(smol, rows, sources=1),
            "WRPO, 4 sources": triples(smol, rows, sources=4),
        },
        "precision": {
            "bfloat16": pairs(smol, rows, dtype="bfloat16"),
            "bfloat16, short": pairs(smol, few, dtype="bfloat16"),
            "float32, short": pairs(smol, few),
        },
        "softcap": {"Gemma-3-1B, softcap 30": softcapped, "none": softcapped._replace(softcap=None)},
        "vocabulary": {f"V={v}": Setting(v, 576, response=rows // 4) for v in (8192, 32000, 49152, 128256, 262144)},
        "response": {f"{t} tokens": Setting(32000, 256, response=t) for t in (64, 256, 1024, 2048, 4096, 8192)},
        "prompt": {f"{share:.0%} prompt": prompted(smol, 2 * rows, share) for share in (0.0, 0.3, 0.6, 0.9)},
        "budget": {
            f"{mib} MiB": Setting(*HEADS[smol], response=rows, prompt=0, budget_mib=mib)
            for mib in (64, 128, 256, 512, 1024, 4096)
        },
        "toy": toys(),
    }
    return {
        "heads": Scenario("heads", "heads of real models", points["heads"], None),
        "kinds": Scenario("kinds", "trained, frozen, LoRA and no_grad heads", points["kinds"]),
        "layouts": Scenario("layouts", "pairs, triples and several sources", points["layouts"]),
        "precision": Scenario("precision", "16 and 32 bits", points["precision"]),
        "softcap": Scenario("softcap", "with and without the cap of Gemma's logits", points["softcap"]),
        "vocabulary": Scenario("vocabulary", "growing vocabularies", points["vocabulary"], FEW, "vocabulary"),
        "response": Scenario("response", "longer responses", points["response"], FEW, "response"),
        "prompt": Scenario("prompt", "the same tokens, more of them prompt", points["prompt"], FEW, "prompt_share"),
        "budget": Scenario(
            "budget", "bytes for logits", points["budget"], ("fused", "torch linear CE, budget"), "budget_mib"
        ),
        "toy": Scenario("toy", "all overhead", points["toy"], None),
    }


def quick(rows: int) -> dict[str, Scenario]:
    smol, few = "SmolLM2-135M", max(16, rows // 16)
    kinds = {head: pairs(smol, rows, head=head) for head in ("frozen", "no_grad")}
    more = {"WRPO triple": triples(smol, rows, sources=1), "90% prompt": prompted(smol, rows, 0.9)}
    scenarios = (
        Scenario("heads", "heads of real models", {smol: pairs(smol, rows)}, None),
        Scenario("kinds", "frozen and no_grad heads", kinds),
        Scenario("layouts", "a triple; a long prompt", more),
        Scenario("precision", "16 bits", {"bfloat16, short": pairs(smol, few, dtype="bfloat16")}),
        Scenario("toy", "all overhead", toys()),
    )
    return {scenario.name: scenario for scenario in scenarios}


def acceptance() -> Scenario:
    """The figures that the log follows from commit to commit; beside the floor, and beside plain torch at toy size."""
    wide = Setting(65536, 1024, examples=2, response=256, prompt=256)
    points = {
        f"{dtype}, {head}": wide._replace(dtype=dtype, head=head)
        for dtype in ("bfloat16", "float32")
        for head in ("trained", "frozen")
    }
    return Scenario("acceptance", "D = 1024, V = 65536 and a toy", points | toys(), ("fused", "plain torch"))


def triples(model: str, rows: int, sources: int) -> Setting:
    vocabulary, width = HEADS[model]
    response = rows // (sources + 2)
    return Setting(vocabulary, width, sources=sources, response=response, prompt=response)


def prompted(model: str, tokens: int, share: float) -> Setting:
    """One pair of `tokens` tokens in all, a share of them prompt."""
    prompt = round(share * tokens / 2)
    return Setting(*HEADS[model], response=tokens // 2 - prompt, prompt=prompt)


def toys() -> dict[str, Setting]:
    toy = Setting(1000, 64, examples=2, response=16)
    return {"N=64 D=64 V=1000": toy, "the same, bfloat16": toy._replace(dtype="bfloat16")}
