"""`wrpo sample` with models that run in this process: the answers are the model's, whatever stands beside them."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import own_log
from tiny_tokenizer import REFUSES_SYSTEM, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from wrpo import cli

PROMPTS = ["two", "what is the sum of two and three?", "hello world " * 4, "five", "five!"]
CONTEXT = 96


def save_model(folder, *, head: float = 1.0, chat_template: str | None = REFUSES_SYSTEM):
    tokenizer = tiny_tokenizer(chat_template)
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(head)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def sample_in(folder: Path, prompts: list, *flags: str, output: str = "out.jsonl", **source) -> int:
    fields = {"model": "target", "kind": "transformers", "path": str(folder / "model"), "batch_size": 3}
    (folder / "sources.yaml").write_text(json.dumps([fields | source]))
    rows = [{"prompt_id": str(n), "prompt": prompt} for n, prompt in enumerate(prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(folder / "sources.yaml"), str(folder / "prompts.jsonl"), "-o", str(folder / output)]
    return cli.main(["sample", *files, "--max-tokens", "8", *flags])


def written_in(folder: Path, name: str = "out.jsonl") -> dict[tuple[str, int], dict]:
    rows = [json.loads(line) for line in (folder / name).read_bytes().splitlines()]
    found = {(row["prompt_id"], row["sample"]): row for row in rows}
    assert len(found) == len(rows), "an answer was asked twice"
    return found


@pytest.fixture
def sample(tmp_path):
    return partial(sample_in, tmp_path)


@pytest.fixture
def written(tmp_path):
    return partial(written_in, tmp_path)


def greedy(model, tokenizer, prompt: str, limit: int) -> tuple[str, str]:
    """(text, finish_reason), token by token, alone and without padding: the truth."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    while len(new) < limit and tokenizer.eos_token_id not in new:
        with torch.no_grad():
            new.append(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax().item())
    ended = tokenizer.eos_token_id in new
    return tokenizer.decode(new, skip_special_tokens=True), "stop" if ended else "length"


def test_greedy_answers_are_the_models_own_beside_prompts_of_other_lengths(sample, written, tmp_path):
    model, tokenizer = save_model(tmp_path / "model")
    assert sample(PROMPTS, "--temperature", "0", "--samples", "1") == 0
    rows = written()
    assert len({row["response"] for row in rows.values()}) > 2
    for number, prompt in enumerate(PROMPTS):
        row = rows[str(number), 0]
        assert (row["response"], row["finish_reason"]) == greedy(model, tokenizer, prompt, 8)


def test_an_answer_ends_at_any_of_the_models_end_tokens(sample, written, tmp_path):
    model, tokenizer = save_model(tmp_path / "model")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(10, len(tokenizer))]
    model.generation_config.save_pretrained(tmp_path / "model")
    assert sample(PROMPTS, "--temperature", "0", "--samples", "1") == 0
    assert {row["finish_reason"] for row in written().values()} == {"stop"}


def test_five_answers_a_prompt_differ_and_come_again_with_the_same_seed(sample, written, tmp_path):
    save_model(tmp_path / "model")
    for name, seed in (("one", "42"), ("again", "42"), ("other", "43")):
        assert sample(PROMPTS, "--seed", seed, output=f"{name}.jsonl") == 0
    one, again, other = (written(f"{name}.jsonl") for name in ("one", "again", "other"))
    assert one.keys() == {(str(n), s) for n in range(len(PROMPTS)) for s in range(5)}
    assert one == again
    assert len({row["response"] for row in one.values()}) > 20
    assert sum(one[key]["response"] == other[key]["response"] for key in one) < 3


def test_a_models_own_top_k_does_not_narrow_what_was_asked_for(sample, written, tmp_path):
    model, tokenizer = save_model(tmp_path / "model", head=1e-3)  # every token is as likely as any other, almost
    model.generation_config.top_k = 50
    model.generation_config.save_pretrained(tmp_path / "model")
    flags = ["--samples", "400", "--temperature", "1", "--top-p", "1", "--max-tokens", "1"]
    assert sample(["two"], *flags, batch_size=200) == 0
    # 400 draws out of 330 show about 230 different tokens, of which the special ones and broken bytes look alike.
    assert len({row["response"] for row in written().values()}) > 75
    assert len(tokenizer) > 300


CARRIED = {
    "penalties": {
        "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "exponential_decay_length_penalty": [1, 3.0],
        "temperature": 5.0, "top_k": 2, "do_sample": True,
    },
    "beams in a dictionary": {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True},
    "cut-offs": {"min_p": 0.5, "typical_p": 0.5, "epsilon_cutoff": 0.1, "do_sample": True},
    "forced": {
        "forced_eos_token_id": 3, "suppress_tokens": [40, 41, 42], "min_new_tokens": 5, "stop_strings": ["e"],
    },
}  # fmt: skip


GREEDY, DRAWN = ["--temperature", "0", "--samples", "1"], ["--temperature", "1", "--top_p", "1"]


@pytest.fixture(scope="module")
def untold(tmp_path_factory) -> tuple[Path, list[tuple[str, str]], dict]:
    """The folder of a model whose checkpoint says nothing of drawing, its greedy answers, and rows of drawn ones."""
    folder = tmp_path_factory.mktemp("untold")
    model, tokenizer = save_model(folder / "model")
    with own_log():
        assert sample_in(folder, PROMPTS, *DRAWN) == 0
    return folder / "model", [greedy(model, tokenizer, prompt, 8) for prompt in PROMPTS], written_in(folder)


@pytest.mark.parametrize("carried", CARRIED.values(), ids=CARRIED)
def test_what_a_checkpoint_says_of_drawing_changes_no_answer(carried, untold, sample, written, tmp_path):
    model, most_likely, drawn = untold
    shutil.copytree(model, tmp_path / "model")
    own = json.loads((model / "generation_config.json").read_text())
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(own | carried))
    assert sample(PROMPTS, *GREEDY, output="greedy.jsonl") == 0
    rows = written("greedy.jsonl")
    assert [(rows[str(n), 0]["response"], rows[str(n), 0]["finish_reason"]) for n in range(5)] == most_likely
    assert sample(PROMPTS, *DRAWN, output="drawn.jsonl") == 0
    assert written("drawn.jsonl") == drawn


def test_a_run_says_how_it_draws_and_what_it_does_not_take_over(sample, tmp_path, capsys):
    save_model(tmp_path / "model")
    assert sample(["two"], "--samples", "1", output="plain.jsonl") == 0
    assert "which is not used here" not in capsys.readouterr().err
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.5}))
    assert sample(["two"], "--samples", "1", "--temperature", "0.7") == 0
    shown = capsys.readouterr().err
    place = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert f"target: float32 on {place}, temperature 0.7, top_p 0.95, at most 8 tokens, ending at '<|im_end|>'" in shown
    assert "target: its generation_config holds more, which is not used here: repetition_penalty 1.5" in shown


@pytest.mark.parametrize("end", ["</s>", -1, 1.5, 99999, [["<bos>"], 10**30]])
def test_an_end_token_that_the_model_does_not_have_is_said_and_ends_nothing(end, sample, written, tmp_path, capsys):
    save_model(tmp_path / "model")
    assert sample(PROMPTS[:1], "--temperature", "0", "--samples", "1", output="plain.jsonl") == 0
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": end}))
    assert sample(PROMPTS[:1], "--temperature", "0", "--samples", "1") == 0
    assert "target: its generation_config holds what cannot be used: eos_token_id" in capsys.readouterr().err
    assert written() == written("plain.jsonl")


def test_an_answer_ends_at_the_end_of_turn_of_the_template_though_the_checkpoint_does_not_know_it(
    sample, written, tmp_path
):
    model, tokenizer = save_model(tmp_path / "model")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": PROMPTS[0]}], add_generation_prompt=True)
    with torch.no_grad():  # what the model would say first and the end of turn change places
        first = model(input_ids=torch.tensor([asked["input_ids"]])).logits[0, -1].argmax().item()
        model.lm_head.weight[torch.tensor([end, first])] = model.lm_head.weight[torch.tensor([first, end])]
    model.generation_config.eos_token_id = tokenizer.bos_token_id
    model.save_pretrained(tmp_path / "model")
    tokenizer.eos_token = "<bos>"
    tokenizer.save_pretrained(tmp_path / "model")
    assert sample(PROMPTS[:1], "--temperature", "0", "--samples", "1") == 0
    (row,) = written().values()
    assert (row["response"], row["finish_reason"]) == ("", "stop")


def test_padding_that_the_model_has_no_row_for_does_not_matter(sample, written, tmp_path):
    model, tokenizer = save_model(tmp_path / "model")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "model")
    assert sample(PROMPTS, "--temperature", "0", "--samples", "1") == 0
    for number, prompt in enumerate(PROMPTS):
        assert written()[str(number), 0]["response"] == greedy(model, tokenizer, prompt, 8)[0]


def test_a_lora_answers_as_its_model_with_it(sample, written, tmp_path):
    from peft import LoraConfig, get_peft_model

    _, tokenizer = save_model(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    adapted.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert sample(PROMPTS, "--temperature", "0", "--samples", "1") == 0
    for number, prompt in enumerate(PROMPTS):
        row = written()[str(number), 0]
        assert (row["response"], row["finish_reason"]) == greedy(adapted, tokenizer, prompt, 8)


def test_a_stopped_run_goes_on(sample, written, tmp_path):
    save_model(tmp_path / "model")
    assert sample(PROMPTS[:2], "--samples", "2") == 0
    before = written()
    assert sample(PROMPTS, "--samples", "3") == 0
    after = written()
    assert len(after) == 15
    assert {key: after[key] for key in before} == before


def test_a_prompt_that_the_template_refuses_or_that_is_too_long_costs_itself(sample, written, tmp_path, capsys):
    save_model(tmp_path / "model")
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "two"}]
    assert sample(["two", system, "long " * CONTEXT, "five"], "--samples", "1") == 3
    assert written().keys() == {("0", 0), ("3", 0)}
    shown = capsys.readouterr().out
    assert "expected messages the chat template accepts, got its refusal: no system turns" in shown
    assert f"and the model takes {CONTEXT}" in shown


def test_any_number_of_prompts_that_are_too_long_do_not_end_asking_the_model(sample, written, tmp_path):
    save_model(tmp_path / "model")
    prompts = [*["long " * CONTEXT] * 20, "five"]
    assert sample(prompts, "--samples", "1", batch_size=1) == 3  # a window is 16 requests
    assert written().keys() == {("20", 0)}


def test_a_batch_that_does_not_fit_into_memory_is_halved(sample, written, tmp_path, monkeypatch):
    model, tokenizer = save_model(tmp_path / "model")
    generate = LlamaForCausalLM.generate

    def small(self, input_ids, **more):
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return generate(self, input_ids=input_ids, **more)

    monkeypatch.setattr(LlamaForCausalLM, "generate", small)
    assert sample(PROMPTS, "--temperature", "0", "--samples", "1") == 0
    assert [written()[str(n), 0]["response"] for n in range(len(PROMPTS))] == [
        greedy(model, tokenizer, prompt, 8)[0] for prompt in PROMPTS
    ]


@pytest.mark.parametrize(
    ("template", "source", "words"),
    [
        (None, {}, "target: expected a tokenizer with a chat template, got one without. Take the chat version of"),
        (REFUSES_SYSTEM, {"path": "nowhere"}, ": path 'nowhere': "),
        (REFUSES_SYSTEM, {"kind": "vllm"}, "pip install 'wrpo[vllm]'"),
        (REFUSES_SYSTEM, {"batch_size": 0}, "batch_size: expected a whole number >= 1, got 0"),
    ],
)
def test_a_model_that_cannot_answer_is_one_line(template, source, words, sample, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    save_model(tmp_path / "model", chat_template=template)
    capsys.readouterr()
    assert sample(["two"], **source) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.count("\n") == 1


def test_vllm_is_asked_with_its_own_arguments_and_its_answers_keep_their_places(sample, written, monkeypatch):
    """An object with vLLM's interface stands in for it: what is tested is what we hand over and what we read."""
    asked, engines, tokenizer = [], [], tiny_tokenizer()

    class LLM:
        def __init__(self, **arguments):
            assert arguments == {"model": "org/m", "tensor_parallel_size": 2}
            self.itself = self
            engines.append(weakref.ref(self))

        def get_tokenizer(self):
            return tokenizer

        def generate(self, prompts, how, use_tqdm):
            texts = [tokenizer.decode(prompt["prompt_token_ids"]) for prompt in prompts]
            if any("too long" in text for text in texts):
                raise ValueError("the prompt is longer than the model takes")
            asked.extend(how)
            texts = [f"{text} {h.seed}" for text, h in zip(texts, how, strict=True)]
            return [SimpleNamespace(outputs=[SimpleNamespace(text=text, finish_reason="length")]) for text in texts]

    vllm = SimpleNamespace(LLM=LLM, SamplingParams=lambda **how: SimpleNamespace(**how))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    engine = {"path": "org/m", "engine": {"tensor_parallel_size": 2}, "batch_size": 4}
    assert sample(["two", "too long", "five"], kind="vllm", **engine) == 3
    assert [engine() for engine in engines] == [None], "the engine's memory is given back"
    rows = written()
    assert rows.keys() == {(prompt, n) for prompt in "02" for n in range(5)}
    assert {(how.temperature, how.top_p, how.max_tokens) for how in asked} == {(0.8, 0.95, 8)}
    for row in rows.values():
        turns = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        assert row["response"] == f"{turns} {row['seed']}"
        assert row["finish_reason"] == "length"
