"""What is compared on what: heads of real models, lengths, layouts, precisions, budgets, and toys.

Every size hangs on `rows`, the N of a typical point, and every problem on the `dtype` that people train in there, so
that a CPU and a GPU get problems that fill them.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.suite.problem import Setting

HEADS = {  # V, D
    "SmolLM2-135M": (49152, 576),
    "Qwen3-0.6B": (151936, 1024),
    "Gemma-3-1B": (262144, 1152),
    "Llama-3-8B": (128256, 4096),
}
# For curves and variants, where all contestants would take an hour: ours, what people write, and one of each kind.
FEW = ("fused", "plain torch", "torch linear CE (budget)", "TRL fused head", "Liger DPO")
SOME = ("fused", "plain torch", "torch linear CE (budget)")


class Scenario(NamedTuple):
    """points: a label and a setting each. contestants: their names; None is all. axis: what a curve is drawn along."""

    name: str
    says: str
    points: dict[str, Setting]
    contestants: tuple[str, ...] | None = FEW
    axis: str | None = None


def pairs(model: str, rows: int, dtype: str, **more) -> Setting:
    """One DPO pair with `rows` counted tokens behind a prompt as long as the response."""
    vocabulary, width = HEADS[model]
    return Setting(vocabulary, width, response=rows // 2, prompt=rows // 2, dtype=dtype, **more)


def full(rows: int, dtype: str) -> dict[str, Scenario]:
    smol, few = "SmolLM2-135M", max(16, rows // 16)
    base = pairs(smol, rows, dtype)
    large = {
        "Qwen3-0.6B": pairs("Qwen3-0.6B", rows // 2, dtype),
        "Gemma-3-1B": pairs("Gemma-3-1B", rows // 4, dtype),
        "Llama-3-8B": pairs("Llama-3-8B", rows // 8, dtype),
    }
    gemma = pairs("Gemma-3-1B", few, dtype)
    layouts = {"WRPO triple": triples(smol, rows, 1, dtype), "WRPO, 4 sources": triples(smol, rows, 4, dtype)}
    precision = {
        "bfloat16": base._replace(dtype="bfloat16"),
        "float32, short": pairs(smol, few, "float32"),
        "bfloat16, short": pairs(smol, few, "bfloat16"),
    }
    vocabularies = {
        f"V={v}": Setting(v, 576, response=rows // 8, dtype=dtype) for v in (8192, 32000, 49152, 128256, 262144)
    }
    # Lengths to 8192 need a head that leaves a CPU the time for them.
    vocabulary, width = (8192, 256) if rows <= 1024 else HEADS[smol]
    lengths = (64, 256, 1024, 2048, 4096, 8192)
    responses = {f"{t} tokens": Setting(vocabulary, width, response=t, dtype=dtype) for t in lengths}
    prompts = {f"{share:.0%} prompt": prompted(smol, rows, share, dtype) for share in (0.0, 0.3, 0.6, 0.9)}
    budgets = {f"{mib} MiB": base._replace(prompt=0, budget_mib=mib) for mib in (64, 128, 256, 512, 1024, 4096)}
    scenarios = (
        Scenario("everyone", "all contestants on one head", {smol: base}, None),
        Scenario("heads", "heads of larger models", large, SOME),
        Scenario("kinds", "frozen, LoRA and no_grad heads",
                 {f"{head} head": base._replace(head=head) for head in ("frozen", "lora", "no_grad")}),
        Scenario("layouts", "triples and several sources", layouts),
        Scenario("precision", "16 and 32 bits", precision, SOME),
        Scenario("softcap", "with and without the cap of Gemma's logits",
                 {"Gemma-3-1B, softcap 30": gemma._replace(softcap=30.0), "Gemma-3-1B, no softcap": gemma}, SOME),
        Scenario("vocabulary", "growing vocabularies", vocabularies, FEW, "vocabulary"),
        Scenario("response", "longer responses", responses, FEW, "response"),
        Scenario("prompt", "longer prompts", prompts, FEW, "prompt_share"),
        Scenario("budget", "bytes for logits", budgets, ("fused", "torch linear CE (budget)")),
        Scenario("toy", "all overhead", toys(), None),
    )  # fmt: skip
    return {scenario.name: scenario for scenario in scenarios}


def quick(rows: int, dtype: str) -> dict[str, Scenario]:
    smol = "SmolLM2-135M"
    base = pairs(smol, rows, dtype)
    kinds = {f"{head} head": base._replace(head=head) for head in ("frozen", "no_grad")}
    layouts = {"WRPO triple": triples(smol, rows, 1, dtype), "90% prompt": prompted(smol, rows, 0.9, dtype)}
    scenarios = (
        Scenario("everyone", "all contestants on one head", {smol: base}, None),
        Scenario("kinds", "frozen and no_grad heads", kinds),
        Scenario("layouts", "a triple; a long prompt", layouts),
        Scenario("precision", "16 bits", {"bfloat16, short": pairs(smol, max(16, rows // 16), "bfloat16")}, SOME),
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


def triples(model: str, rows: int, sources: int, dtype: str) -> Setting:
    vocabulary, width = HEADS[model]
    response = rows // (sources + 2)
    return Setting(vocabulary, width, sources=sources, response=response, prompt=response, dtype=dtype)


def prompted(model: str, tokens: int, share: float, dtype: str) -> Setting:
    """One pair of `tokens` tokens in all, a share of them prompt."""
    prompt = round(share * tokens / 2)
    return Setting(*HEADS[model], response=tokens // 2 - prompt, prompt=prompt, dtype=dtype)


def toys() -> dict[str, Setting]:
    toy = Setting(1000, 64, examples=2, response=16)
    return {"toy, D=64 V=1000": toy, "toy, bfloat16": toy._replace(dtype="bfloat16")}


NAMES = (*full(512, "float32"), "acceptance")
