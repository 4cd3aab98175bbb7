"""The Python face on a toy folder: what a user can ask, in which shapes, and what is refused."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from models.toys import make_toy

import nanovllm
from nanovllm import LLM, SamplingParams
from nanovllm.errors import (
    ConfigError,
    EngineDead,
    InvalidPrompt,
    InvalidSamplingParams,
    ModelNotFound,
    NotEnoughMemory,
    PromptTooLong,
    RequestError,
)

OPTIONS: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "num_kv_blocks": 128, "max_num_seqs": 8}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = ["The quick brown fox jumps over the lazy dog. " * 3, "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich."]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a byte-level BPE tokenizer of its own: 320 rows for fewer tokens, as checkpoints often have it."""
    folder = tmp_path_factory.mktemp("toy")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    sizes = {"vocab_size": 320, "eos_token_id": 0, "max_position_embeddings": 256, "tie_word_embeddings": True}
    make_toy("llama", folder, **sizes)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    torch.set_num_threads(1)
    with LLM(folder, **OPTIONS) as llm:
        yield llm


@pytest.fixture
def fresh(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    """An engine of its own that fails where it would turn without work for ever."""
    with LLM(folder, **OPTIONS) as llm:
        step = llm.engine.step
        monkeypatch.setattr(llm.engine, "step", lambda: step() if llm.engine.has_work else pytest.fail("a step without work"))
        yield llm


@pytest.fixture(autouse=True)
def nothing_is_left_running(llm: LLM) -> Iterator[None]:
    yield
    assert not llm.engine.has_work and not llm.engine._requests


class TestGenerate:
    def test_a_string(self, llm):
        (output,) = llm.generate("The quick", GREEDY, use_tqdm=False)
        assert output.prompt == "The quick" and output.finished
        assert output.prompt_token_ids == llm.tokenizer.encode("The quick")
        assert output.text == llm.tokenizer.decode(output.token_ids)
        assert output.completions[0].finish_reason in ("stop", "length")

    def test_a_list_of_token_ids(self, llm):
        token_ids = llm.tokenizer.encode("The quick")
        (by_ids,), (by_text,) = llm.generate(token_ids, GREEDY), llm.generate("The quick", GREEDY)
        assert by_ids.prompt is None and by_ids.prompt_token_ids == token_ids
        assert by_ids.token_ids == by_text.token_ids

    def test_many_of_both_kinds_in_their_order(self, llm):
        prompts = ["fox", llm.tokenizer.encode("lazy dog"), "über", "The quick brown fox jumps", "fox"]
        outputs = llm.generate(prompts, GREEDY)
        assert [output.token_ids for output in outputs] == [llm.generate([one], GREEDY)[0].token_ids for one in prompts]
        assert outputs[0].prompt == "fox" and outputs[1].prompt is None

    def test_order_is_kept_although_later_prompts_end_first(self, llm):
        params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (9, 2, 5)]
        outputs = llm.generate(["a", "b", "c"], params)
        assert [len(output.token_ids) for output in outputs] == [9, 2, 5]

    def test_without_params_it_samples_up_to_64_tokens(self, llm):
        (output,) = llm.generate("The")
        assert 1 <= len(output.token_ids) <= 64

    def test_outputs_answer_to_the_keys_that_nano_vllm_scripts_use(self, llm):
        (output,) = llm.generate(["fox"], GREEDY, use_tqdm=False)
        assert output["text"] == output.text and output["token_ids"] == output.token_ids
        with pytest.raises(KeyError, match="logprobs"):
            output["logprobs"]

    def test_a_nano_vllm_script_runs_as_it_is(self, folder):
        sizes = {"num_kvcache_blocks": 64, "kvcache_block_size": 16, "dtype": "float32", "num_threads": 1}
        llm = LLM(str(folder), enforce_eager=True, tensor_parallel_size=1, **sizes)
        outputs = llm.generate(["fox", "dog"], SamplingParams(temperature=0.6, max_tokens=4, ignore_eos=True), use_tqdm=False)
        assert [len(output["token_ids"]) for output in outputs] == [4, 4]
        assert all(isinstance(output["text"], str) for output in outputs)
        llm.close()

    def test_the_bar_is_drawn_only_when_it_is_asked_for(self, llm, capfd):
        llm.generate(["fox"], GREEDY, use_tqdm=False)
        assert "Generating" not in capfd.readouterr().err
        llm.generate(["fox"], GREEDY)
        assert "Generating" in capfd.readouterr().err

    def test_no_prompts_give_no_outputs(self, llm):
        assert llm.generate([], GREEDY, use_tqdm=False) == []

    def test_several_completions(self, llm):
        (output,) = llm.generate("fox", SamplingParams(n=3, seed=1, max_tokens=6, ignore_eos=True))
        assert [completion.index for completion in output.completions] == [0, 1, 2]
        assert len({tuple(completion.token_ids) for completion in output.completions}) == 3
        assert output.token_ids == output.completions[0].token_ids

    def test_an_end_token_of_the_config_ends_a_sequence(self, llm):
        biased = SamplingParams(temperature=0, logit_bias={0: 100.0}, max_tokens=5)
        (output,) = llm.generate("fox", biased)
        assert output.token_ids == [0] and output.text == "" and output.completions[0].finish_reason == "stop"


class TestStopStrings:
    @pytest.fixture
    def options(self, llm: LLM) -> dict[str, Any]:
        """Draws printable tokens only, so that every run of them is a text that a user could write."""
        texts = {token_id: llm.tokenizer.decode([token_id]) for token_id in range(3, llm.tokenizer.vocab_size)}
        plain = [token_id for token_id, text in texts.items() if text.isascii() and text.isprintable()]
        return {"temperature": 8, "seed": 3, "max_tokens": 30, "allowed_token_ids": plain}

    @pytest.fixture
    def full(self, llm: LLM, options: dict[str, Any]) -> Any:
        return llm.generate("The", SamplingParams(**options), use_tqdm=False)[0]

    @pytest.fixture
    def stop(self, llm: LLM, full: Any) -> str:
        """From the end of one token over a whole one to the beginning of a third."""
        texts = [llm.tokenizer.decode([token_id]) for token_id in full.token_ids]
        stop = texts[8][-1:] + texts[9] + texts[10][:1]
        assert "".join(texts) == full.text and full.text.index(stop) == len("".join(texts[:9])) - 1, "choose another seed"
        return stop

    def test_may_span_tokens_and_are_cut_off(self, llm, options, full, stop):
        (stopped,) = llm.generate("The", SamplingParams(**options, stop=stop), use_tqdm=False)
        assert stopped.text == full.text[: full.text.index(stop)]
        assert stopped.token_ids == full.token_ids[:11]
        completion = stopped.completions[0]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)

    def test_may_be_kept(self, llm, options, full, stop):
        params = SamplingParams(**options, stop=["nowhere", stop], include_stop_str_in_output=True)
        (stopped,) = llm.generate("The", params, use_tqdm=False)
        assert stopped.text == full.text[: full.text.index(stop) + len(stop)]

    def test_are_never_streamed_in_part(self, llm, options, full, stop):
        deltas = list(llm.stream("The", SamplingParams(**options, stop=stop)))
        assert "".join(delta.text for delta in deltas) == full.text[: full.text.index(stop)]
        assert deltas[-1].finish_reason == "stop"


class TestStream:
    def test_deltas_add_up_to_the_output(self, llm):
        params = SamplingParams(temperature=1, seed=5, max_tokens=40)
        (whole,) = llm.generate("Zwölf", params, use_tqdm=False)
        deltas = list(llm.stream("Zwölf", params))
        assert "".join(delta.text for delta in deltas) == whole.text
        assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
        assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason == whole.completions[0].finish_reason
        assert len(deltas) > 5

    def test_deltas_of_several_completions_say_whose_they_are(self, llm):
        params = SamplingParams(seed=5, max_tokens=10, n=2, ignore_eos=True)
        (whole,) = llm.generate("fox", params, use_tqdm=False)
        texts, ends = {0: "", 1: ""}, []
        for delta in llm.stream("fox", params):
            texts[delta.index] += delta.text
            ends += [delta.index] if delta.finish_reason else []
        assert texts == {completion.index: completion.text for completion in whole.completions}
        assert sorted(ends) == [0, 1]

    def test_closing_early_aborts_the_request(self, llm):
        stream = llm.stream("fox", SamplingParams(max_tokens=50, ignore_eos=True))
        next(stream), next(stream)
        assert llm.engine.has_work
        stream.close()
        free = llm.engine.scheduler.block_manager
        assert not llm.engine.has_work and free.num_free_blocks == free.num_blocks

    def test_leaving_a_loop_early_aborts_the_request(self, llm):
        for delta in llm.stream("fox", SamplingParams(max_tokens=50, ignore_eos=True)):
            if delta.token_ids:
                break
        del delta
        llm.engine.step()  # where the abort takes effect: a finalizer may run at any moment
        assert not llm.engine.has_work

    def test_bad_input_is_refused_at_once_not_at_the_first_delta(self, llm):
        with pytest.raises(InvalidPrompt):
            llm.stream("")

    def test_closing_before_the_first_delta_aborts_the_request_too(self, fresh):
        fresh.stream("fox", GREEDY).close()
        assert not fresh.engine.has_work

    def test_two_streams_may_be_read_in_turns(self, fresh):
        params = SamplingParams(temperature=1, seed=9, max_tokens=8, ignore_eos=True)
        expected = [fresh.generate(prompt, params, use_tqdm=False)[0].token_ids for prompt in ("fox", "dog")]
        streams = [fresh.stream(prompt, params) for prompt in ("fox", "dog")]
        got: list[list[int]] = [[], []]
        for pair in zip_longest(*streams):
            for tokens, delta in zip(got, pair, strict=True):
                tokens += delta.token_ids if delta else []
        assert got == expected

    def test_a_stream_goes_on_after_a_generate_in_between(self, fresh):
        params = SamplingParams(temperature=1, seed=9, max_tokens=8, ignore_eos=True)
        expected = fresh.generate("fox", params, use_tqdm=False)[0].token_ids
        stream = fresh.stream("fox", params)
        tokens = list(next(stream).token_ids)
        fresh.generate("dog", params, use_tqdm=False)
        for delta in stream:
            tokens += delta.token_ids
        assert tokens == expected


class TestChat:
    MESSAGES = ({"role": "user", "content": "fox"},)

    def test_a_conversation_goes_through_the_template(self, llm):
        (output,) = llm.chat(self.MESSAGES, GREEDY)
        text = "<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\n"
        assert output.prompt_token_ids == llm.tokenizer.encode(text, add_special_tokens=False)
        assert output.prompt_token_ids[0] == 1, "the template's marks are single tokens"

    def test_many_conversations(self, llm):
        other = [{"role": "system", "content": "brown"}, *self.MESSAGES]
        outputs = llm.chat([self.MESSAGES, other], GREEDY)
        assert len(outputs) == 2 and len(outputs[1].prompt_token_ids) > len(outputs[0].prompt_token_ids)
        assert outputs[0].token_ids == llm.chat(self.MESSAGES, GREEDY)[0].token_ids

    def test_template_options_are_passed_on(self, llm):
        answer = [*self.MESSAGES, {"role": "assistant", "content": "The"}]
        (output,) = llm.chat(answer, GREEDY, continue_final_message=True)
        text = "<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\nThe"
        assert output.prompt_token_ids == llm.tokenizer.encode(text, add_special_tokens=False)

    @pytest.mark.parametrize("messages", [[[]], [list(MESSAGES), []]])
    def test_a_conversation_without_messages_is_refused(self, llm, messages):
        with pytest.raises(RequestError, match="at least one message"):
            llm.chat(messages, GREEDY)

    def test_no_conversations_give_no_outputs(self, llm):
        assert llm.chat([], GREEDY) == []


class TestLogprobs:
    def test_have_one_entry_for_each_token(self, llm):
        params = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True, logprobs=3, prompt_logprobs=2)
        (output,) = llm.generate("The quick brown", params, use_tqdm=False)
        scores = output.completions[0].logprobs
        assert [score.chosen.token_id for score in scores] == output.token_ids
        assert all(len(score.top) == 3 and score.chosen == score.top[0] for score in scores), "greedy takes the first"
        assert len(output.prompt_logprobs) == len(output.prompt_token_ids) and output.prompt_logprobs[0] is None
        assert all(len(score.top) == 2 and score.chosen.logprob <= 0 for score in output.prompt_logprobs[1:])

    def test_are_absent_unless_asked_for(self, llm):
        (output,) = llm.generate("The quick", GREEDY, use_tqdm=False)
        assert output.completions[0].logprobs is None and output.prompt_logprobs is None

    def test_of_zero_alternatives_report_the_drawn_token_alone(self, llm):
        (output,) = llm.generate("The quick", SamplingParams(max_tokens=3, logprobs=0, ignore_eos=True), use_tqdm=False)
        assert [score.top for score in output.completions[0].logprobs] == [[], [], []]


class TestRefusedRequests:
    @pytest.mark.parametrize(
        ("prompt", "error"),
        [
            ("", InvalidPrompt),
            ([[]], InvalidPrompt),
            ([[1, 2, 320]], InvalidPrompt),
            ([[-1]], InvalidPrompt),
            ([[1, "a"]], InvalidPrompt),
            ([[1, True]], InvalidPrompt),
            ([None], InvalidPrompt),
            ([b"fox"], InvalidPrompt),
            ([[5] * 256], PromptTooLong),
            (["fox", ""], InvalidPrompt),
            (["\ud800"], InvalidPrompt),
        ],
    )
    def test_bad_prompts(self, llm, prompt, error):
        with pytest.raises(error):
            llm.generate(prompt, GREEDY, use_tqdm=False)
        assert not llm.engine.has_work, "and the good ones of the same call are not left behind"

    def test_bad_params(self, llm):
        with pytest.raises(InvalidSamplingParams, match="2 prompts need as many sampling params, got 1"):
            llm.generate(["a", "b"], [GREEDY])
        with pytest.raises(InvalidSamplingParams, match="must be SamplingParams, got dict"):
            llm.generate(["a"], [{"temperature": 0}])
        with pytest.raises(InvalidSamplingParams, match="stop_token_ids: token id 400"):
            llm.generate(["a"], SamplingParams(stop_token_ids=[400]))

    def test_the_longest_prompt_that_fits_gives_one_token(self, llm):
        (output,) = llm.generate([[5] * 255], SamplingParams(temperature=0, max_tokens=None), use_tqdm=False)
        assert len(output.token_ids) == 1


class TestOptions:
    def test_an_unknown_one_gets_a_suggestion(self, folder):
        with pytest.raises(ConfigError, match=r"unknown option 'max_model_length'; did you mean 'max_model_len'\?"):
            LLM(folder, max_model_length=100)

    def test_one_given_twice_under_two_names_is_refused(self, folder):
        with pytest.raises(ConfigError, match="'block_size' is given twice"):
            LLM(folder, block_size=16, kvcache_block_size=16)

    def test_a_context_longer_than_the_models_is_refused(self, folder):
        with pytest.raises(ConfigError, match="max_model_len=257 is more than the model's context of 256"):
            LLM(folder, max_model_len=257)

    def test_a_cache_too_small_for_the_context_names_what_would_help(self, folder):
        with pytest.raises(
            NotEnoughMemory, match="(?s)max_model_len=200 .*lower max_model_len to at most 64, or raise num_kv_blocks to 13$"
        ):
            LLM(folder, **{**OPTIONS, "num_kv_blocks": 4}, max_model_len=200)
        sizes = {key: value for key, value in OPTIONS.items() if key != "num_kv_blocks"}
        with pytest.raises(NotEnoughMemory, match="kv_cache_memory_bytes"):
            LLM(folder, **sizes, kv_cache_memory_bytes=1000)
        with pytest.raises(NotEnoughMemory, match="set kv_cache_memory_bytes to at most"):
            LLM(folder, **sizes, kv_cache_memory_bytes=1 << 60)

    def test_the_size_that_the_error_advises_is_enough(self, folder):
        sizes = {key: value for key, value in OPTIONS.items() if key != "num_kv_blocks"}
        with pytest.raises(NotEnoughMemory) as caught:
            LLM(folder, **sizes, max_model_len=200, kv_cache_memory_bytes=1000)
        advised = int(str(caught.value).split("raise kv_cache_memory_bytes to ")[1])
        with LLM(folder, **sizes, max_model_len=200, kv_cache_memory_bytes=advised) as llm:
            assert llm.memory_plan.max_model_len == 200 and llm.memory_plan.kv_cache <= advised

    def test_rows_that_do_not_fit_are_refused_before_anything_is_allocated(self, folder):
        with pytest.raises(NotEnoughMemory, match="rows of sequences .* a smaller max_num_batched_tokens, max_num_seqs"):
            LLM(folder, **{**OPTIONS, "max_num_seqs": 10**10})

    def test_without_max_model_len_the_cache_decides(self, folder):
        with LLM(folder, **{**OPTIONS, "num_kv_blocks": 4}) as llm:
            assert llm.config.max_model_len == 64
            with pytest.raises(PromptTooLong, match="max_model_len=64"):
                llm.generate([[5] * 64], GREEDY)

    @pytest.mark.parametrize("model", ["/nowhere/at/all", "", "no such folder"])
    def test_a_model_that_is_not_there(self, model):
        with pytest.raises(ModelNotFound):
            LLM(model)

    def test_every_auto_is_decided_in_the_config_that_is_kept(self, llm):
        config = llm.config
        assert config.device == "cpu" and config.dtype == "float32" and config.max_model_len == 256
        assert None not in (config.max_num_batched_tokens, config.num_steps_ahead, config.gpu_memory_utilization)


class TestLifetime:
    def test_close_releases_the_model_and_may_be_repeated(self, folder):
        llm = LLM(folder, **OPTIONS)
        llm.close()
        llm.close()
        with pytest.raises(EngineDead, match="closed"):
            llm.generate(["fox"], GREEDY)

    def test_the_context_manager_closes_also_after_an_error(self, folder):
        with pytest.raises(ZeroDivisionError), LLM(folder, **OPTIONS) as llm:
            raise ZeroDivisionError
        with pytest.raises(EngineDead):
            llm.generate(["fox"], GREEDY)

    def test_two_engines_in_one_process_do_not_disturb_each_other(self, llm, folder):
        expected = [output.token_ids for output in llm.generate(["fox", "dog"], GREEDY, use_tqdm=False)]
        with LLM(folder, **{**OPTIONS, "block_size": 4, "num_steps_ahead": 2}) as other:
            tokens: list[list[int]] = [[], []]
            for pair in zip_longest(llm.stream("fox", GREEDY), other.stream("dog", GREEDY)):
                for mine, delta in zip(tokens, pair, strict=True):
                    mine += delta.token_ids if delta else []
        assert tokens == expected
        assert llm.generate("dog", GREEDY, use_tqdm=False)[0].token_ids == expected[1]


OPTIMISED = """
import sys, warnings
from nanovllm import LLM, SamplingParams
assert False, "this line must not run: the script needs python -O"
folder = sys.argv[1]
options = dict(dtype="float32", num_threads=1, num_kv_blocks=32, max_num_seqs=2)

def kind_of(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "accepted"

llm = LLM(folder, **options)
params = SamplingParams(temperature=0, max_tokens=2)
for call in (
    lambda: SamplingParams(temperature=-1),
    lambda: SamplingParams(top_p=0),
    lambda: SamplingParams(stop=[""]),
    lambda: SamplingParams(n=0),
    lambda: llm.generate([[]], params, use_tqdm=False),
    lambda: llm.generate([[999]], params, use_tqdm=False),
    lambda: llm.generate([[5] * 300], params, use_tqdm=False),
    lambda: llm.generate(["a", "b"], [params], use_tqdm=False),
    lambda: llm.chat([[]], params),
    lambda: LLM(folder, no_such_option=1),
    lambda: LLM(folder, max_num_seqs=0),
    lambda: LLM(folder, max_model_len=100000),
    lambda: LLM(folder, **{**options, "num_kv_blocks": 2}, max_model_len=200),
    lambda: LLM("/nowhere/at/all"),
    lambda: llm.generate(["fox"], params, use_tqdm=False),
):
    print(kind_of(call))
"""


def test_checks_do_not_depend_on_assertions(folder):
    """`python -O` strips them."""
    root = str(Path(nanovllm.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-O", "-c", OPTIMISED, str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [
        *["InvalidSamplingParams"] * 4,
        *["InvalidPrompt"] * 2,
        "PromptTooLong",
        "InvalidSamplingParams",
        "RequestError",
        *["ConfigError"] * 3,
        "NotEnoughMemory",
        "ModelNotFound",
        "accepted",
    ]
