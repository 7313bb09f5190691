"""Implicit-reward accuracy: what the fused head gives is what the models' own logits say, triple by triple."""

from __future__ import annotations

import json
import weakref

import datasets
import pytest
import torch
from tiny_models import ATOL, plain_logp, preference_batch, tiny_model, tiny_rows
from tiny_tokenizer import tiny_tokenizer

from wrpo import cli
from wrpo.evaluation import implicit_reward
from wrpo.evaluation.implicit_reward import implicit_reward_accuracy, response_logps


class Padding:
    pad_token_id = 0


def uneven_rows() -> list[dict]:
    return [row for k in (1, 3, 2) for row in tiny_rows(4, sources=k, seed=k)]


def own_logps(model: torch.nn.Module, rows: list[dict]) -> list[torch.Tensor]:
    """[K + 2] float64 of each row by itself, from full logits."""
    with torch.no_grad():
        return [plain_logp(model.eval(), preference_batch([row])) for row in rows]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_log_probs_are_those_of_full_logits_whatever_the_batch(batch_size):
    rows = uneven_rows()
    expected = own_logps(tiny_model("gemma2-softcap"), rows)
    found = response_logps(tiny_model("gemma2-softcap"), rows, Padding, batch_size=batch_size, title="policy")
    for got, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=0, atol=ATOL)


def test_the_accuracy_counts_triples_whose_chosen_answer_gained_more_than_the_rejected_one():
    rows = uneven_rows()
    for row in rows:
        sources = row["role"].count("source")
        row["share"] = [*(k / sum(range(1, sources + 1)) for k in range(1, sources + 1)), 1.0, 1.0]
    models = tiny_model(seed=1), tiny_model(seed=2)
    truth = {"source": [], "target": [], "weighted": []}
    for policy, reference, row in zip(*(own_logps(model, rows) for model in models), rows, strict=True):
        *sources, target, rejected = (0.5 * (policy - reference)).tolist()
        source = sum(w * r for w, r in zip(row["share"], sources, strict=False))
        truth["source"].append(source - rejected)
        truth["target"].append(target - rejected)
        truth["weighted"].append(0.25 * source + 0.75 * target - rejected)
    logps = [response_logps(model, rows, Padding, batch_size=4, title="") for model in models]
    found = implicit_reward_accuracy(*logps, rows, alpha=0.25, beta=0.5)
    for name, margins in truth.items():
        assert min(abs(margin) for margin in margins) > 4 * ATOL, "a margin within rounding would decide by chance"
        assert found[name].accuracy == sum(margin > 0 for margin in margins) / len(rows)
        assert found[name].margin == pytest.approx(sum(margins) / len(rows), abs=4 * ATOL)
        assert found[name].interval.low < found[name].accuracy < found[name].interval.high
        assert found[name].triples == len(rows)


def test_a_policy_that_is_its_reference_prefers_nothing():
    rows = tiny_rows(6)
    logps = response_logps(tiny_model(), rows, Padding, batch_size=3, title="")
    found = implicit_reward_accuracy(logps, logps, rows, alpha=0.1, beta=0.01)
    assert {name: (one.accuracy, one.margin) for name, one in found.items()} == dict.fromkeys(found, (0.0, 0.0))


@pytest.fixture
def saved_models(tmp_path, monkeypatch):
    """Folders of two tiny models with their tokenizer, and a file of triples."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = tiny_tokenizer()
    for seed, name in enumerate(("reference", "policy")):
        tiny_model(seed=seed, vocab_size=len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [
        {"prompt": f"{n}?", "source_chosen": f"yes {n}", "target_chosen": "of course", "rejected": "no" * n}
        for n in range(1, 8)
    ]
    (tmp_path / "triples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def arguments(folder) -> list[str]:
    names = {"--triples": "triples.jsonl", "--policy": "policy", "--reference": "reference", "-o": "out"}
    return ["eval", *(part for flag, name in names.items() for part in (flag, str(folder / name)))]


def test_the_command_gives_the_accuracies_of_two_saved_models(saved_models, capsys):
    assert cli.main(arguments(saved_models)) == 0
    measured = json.loads((saved_models / "out/eval.json").read_text())["implicit_reward"]
    assert set(measured) == {"source", "target", "weighted"}
    assert all(one["triples"] == 7 for one in measured.values())
    shown = capsys.readouterr().out
    for name, one in measured.items():
        assert f"{one['accuracy']:.1%}" in next(line for line in shown.splitlines() if line.startswith(name))
    assert (saved_models / "out/eval.png").exists()


def test_the_layout_that_the_command_names_is_that_of_both_models(saved_models, monkeypatch):
    asked, real = [], implicit_reward.in_layout
    monkeypatch.setattr(
        implicit_reward, "in_layout", lambda wanted, *a, **k: asked.append(wanted) or real(wanted, *a, **k)
    )
    assert cli.main([*arguments(saved_models), "--layout", "packed"]) == 0
    assert asked == ["packed", "packed"]


def test_the_policy_is_gone_before_the_reference_is_loaded(saved_models, monkeypatch):
    loaded, load = [], implicit_reward.load_model

    def counted(settings, named):
        assert not [model for model in loaded if model() is not None]
        model = load(settings, named)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(implicit_reward, "load_model", counted)
    assert cli.main(arguments(saved_models)) == 0
    assert len(loaded) == 2


@pytest.mark.parametrize("flag", ["--policy", "--reference"])
def test_a_model_that_is_not_there_is_named_by_its_flag(flag, saved_models, capsys):
    flags = arguments(saved_models)
    flags[flags.index(flag) + 1] = "nowhere"
    assert cli.main(flags) == 2
    assert f"{flag} 'nowhere': " in capsys.readouterr().err


def test_a_reference_of_another_vocabulary_is_refused(saved_models, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(saved_models / "reference")
    assert cli.main(arguments(saved_models)) == 2
    assert "--reference has another vocabulary than --policy" in capsys.readouterr().err
