"""What a chat teaches is what its template renders, for the traits of public families, held against transformers."""

import copy
import itertools

import pytest
from tokenizers import AddedToken

from rlhf import data
from rlhf.data.files import Bad
from tests.rlhf.data.chat_families import CONVERSATIONS, FAMILIES, tokenizer_of


def shared(first, second):
    """How many ids two lists begin with alike."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))


def rendered(tokenizer, messages, tools, kwargs, **options):
    return list(tokenizer.apply_chat_template(messages, tools=tools, return_dict=False, **options, **(kwargs or {})))


def joined(prompt, completion):
    """The messages of a conversation; an answer that goes on from an answer is one with it."""
    if prompt[-1]["role"] != "assistant":
        return prompt + completion
    return [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + completion[0]["content"]}]


def refusal(tokenizer, messages, *options):
    """The words of a template that raises; or what it leaves out."""
    try:
        whole = rendered(tokenizer, messages, *options)
    except Exception as error:
        return " ".join(str(error).split())
    plain = [{name: value for name, value in message.items() if name != "tool_calls"} for message in messages]
    assert whole == rendered(tokenizer, plain, *options) and plain != messages
    return "tool_calls"


def learned_parts(found):
    """Each run of ids that is learned."""
    (ids,), mask = found.responses, (found.learned or [None])[0]
    pairs = zip(ids, mask or [True] * len(ids))
    return [[token for token, _ in run] for known, run in itertools.groupby(pairs, key=lambda pair: pair[1]) if known]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("talk", CONVERSATIONS)
def test_a_chat_is_what_its_template_renders(name, talk):
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    prompt, completion, tools, kwargs = CONVERSATIONS[talk]
    row = {"prompt": data.Chat(prompt, tools, kwargs), "completion": completion}
    messages, first = joined(prompt, completion), len(prompt) - (prompt[-1]["role"] == "assistant")
    if talk in family.refuses:
        reason = refusal(tokenizer, messages, tools, kwargs)
        with pytest.raises(Bad) as caught:
            data.encode_row(tokenizer, row, ("completion",), max_length=9999)
        assert reason in str(caught.value)
        return
    asks = {"continue_final_message" if first < len(prompt) else "add_generation_prompt": True}
    assert data.encode_prompt(tokenizer, row["prompt"]) == rendered(tokenizer, prompt, tools, kwargs, **asks)

    turns = [index for index, message in enumerate(messages) if index >= first and message["role"] == "assistant"]
    found = data.encode_row(tokenizer, row, ("completion",), max_length=9999)
    together = len(turns) > 1 and talk not in family.rewrites
    assert len(found) == (1 if together else len(turns))
    for encoded, index in zip(found, turns[-1:] if together else turns[::-1], strict=True):
        whole = rendered(tokenizer, messages[: index + 1], tools, kwargs)
        (response,) = encoded.responses
        ids = encoded.prompt + response
        assert whole[: len(ids)] == ids
        assert tokenizer.decode(whole[len(ids) :]) == family.behind
        start = turns[0] if together else index
        asks = prompt if start < len(prompt) else messages[:start]
        option = "continue_final_message" if start < len(prompt) else "add_generation_prompt"
        assert len(encoded.prompt) == shared(whole, rendered(tokenizer, asks, tools, kwargs, **{option: True}))
        own = [messages[turn] for turn in (turns if together else [index])]
        for message, part in zip(own, learned_parts(encoded), strict=True):
            text = tokenizer.decode(part)
            assert (message["content"] or "find")[-10:] in text and text.endswith(
                (family.end, *family.ends) if family.end else ""
            )
            assert message is not messages[index] or message.get("reasoning_content", "") in text or name in NO_THOUGHTS


NO_THOUGHTS = [name for name in FAMILIES if "reasoning" not in FAMILIES[name].template and name != "gpt-oss"]


@pytest.mark.parametrize("name", FAMILIES)
def test_all_ends_of_a_turn_are_found(name):
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    ends = family.ends or tuple(filter(None, [family.end]))
    assert tuple(tokenizer.convert_ids_to_tokens(data.end_of_turn_ids(tokenizer))) == ends


def decoded(tokenizer, encoded):
    """(prompt, [(token texts joined, learned?) of each run of each response])."""
    responses = []
    for ids, mask in zip(encoded.responses, encoded.learned or [None] * len(encoded.responses)):
        runs = itertools.groupby(zip(ids, mask or [True] * len(ids)), key=lambda pair: pair[1])
        responses.append([(tokenizer.decode([token for token, _ in run]), known) for known, run in runs])
    return tokenizer.decode(encoded.prompt), responses


def talk_row(*contents, **fields):
    """A row of turns that the user begins; the first is the prompt."""
    roles = itertools.cycle(["user", "assistant"])
    messages = [
        {"role": role, "content": text} if isinstance(text, str) else text for role, text in zip(roles, contents)
    ]
    return {"prompt": data.Chat(messages[:1]), "completion": messages[1:], **fields}


def test_turns_are_learned_but_for_what_the_row_or_the_run_says():
    tokenizer = tokenizer_of("chatml")
    end, middle = "<|im_end|>", "\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    row = talk_row("a", "one", "b", "two")
    (found,) = data.encode_row(tokenizer, row, ("completion",), max_length=999)
    asked = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert decoded(tokenizer, found) == (asked, [[("one" + end, True), (middle, False), ("two" + end, True)]])
    (found,) = data.encode_row(tokenizer, row, ("completion",), max_length=999, learn_turns="last")
    assert decoded(tokenizer, found) == (asked + "one" + end + middle, [[("two" + end, True)]])
    for weights, expected in (
        ((0, 1), (asked + "one" + end + middle, [[("two" + end, True)]])),
        ((1.0, 0), (asked, [[("one" + end, True)]])),
    ):
        row = talk_row("a", *talk_row("a", "one", "b", "two")["completion"])
        for message, weight in zip(row["completion"][::2], weights):
            message["weight"] = weight
        (found,) = data.encode_row(tokenizer, row, ("completion",), max_length=999)
        assert decoded(tokenizer, found) == expected


def test_a_row_of_turns_that_are_not_learned_is_refused():
    row = talk_row("a", {"role": "assistant", "content": "one", "weight": 0})
    with pytest.raises(Bad, match="no turn of the assistant's is learned"):
        data.encode_row(tokenizer_of("chatml"), row, ("completion",), max_length=999)


@pytest.mark.parametrize("weight", [0, 1])
def test_the_beginning_of_a_turn_is_not_learned_behind_another_of_the_assistants(weight):
    """Nor is the end of that other one, where it is not."""
    tokenizer, end, begin = tokenizer_of("chatml"), "<|im_end|>", "\n<|im_start|>assistant\n"
    one, two = ({"role": "assistant", "content": text} for text in ("one", "two"))
    row = {"prompt": data.Chat([{"role": "user", "content": "a"}]), "completion": [{**one, "weight": weight}, two]}
    (found,) = data.encode_row(tokenizer, row, ("completion",), max_length=999)
    asked, last = f"<|im_start|>user\na{end}{begin}", ("two" + end, True)
    learned = [("one" + end, True), (begin, False), last] if weight else [last]
    assert decoded(tokenizer, found) == (asked if weight else asked + "one" + end + begin, [learned])


@pytest.mark.parametrize("name", ["chatml", "qwen3", "deepseek-r1", "llama-2", "gpt-oss"])
def test_all_answers_to_a_chat_share_its_prompt(name):
    tokenizer = tokenizer_of(name)
    prompt, answers = data.Chat([{"role": "user", "content": "a"}]), ["one", "two", {"content": "t", "thinking": "hm"}]
    answers = [{"content": text} if isinstance(text, str) else text for text in answers]
    row = {"prompt": prompt, "completions": [[{"role": "assistant", **answer}] for answer in answers]}
    (found,) = data.encode_row(tokenizer, row, ("completions",), max_length=999)
    wholes = [rendered(tokenizer, prompt + answer, None, None) for answer in row["completions"]]
    asked = rendered(tokenizer, prompt, None, None, add_generation_prompt=True)
    assert len(found.prompt) == min(shared(whole, asked) for whole in wholes) and found.learned is None
    for whole, response in zip(wholes, found.responses, strict=True):
        ids = found.prompt + response
        assert whole[: len(ids)] == ids and tokenizer.decode(whole[len(ids) :]) == FAMILIES[name].behind


def test_answers_of_several_messages_learn_the_assistants():
    tokenizer, longer = tokenizer_of("chatml"), talk_row("a", "one", "b", "two")
    row = {"prompt": longer["prompt"], "chosen": longer["completion"], "rejected": longer["completion"][:1]}
    (found,) = data.encode_row(tokenizer, row, ("chosen", "rejected"), max_length=999)
    ends = ("<|im_end|>", "\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n")
    assert decoded(tokenizer, found)[1] == [
        [("one" + ends[0], True), (ends[1], False), ("two" + ends[0], True)],
        [("one" + ends[0], True)],
    ]


def test_answers_whose_earlier_turns_are_rendered_otherwise():
    """They cannot be learned as one; where nothing is learned of single tokens they are read as they are rendered."""
    tokenizer, row = tokenizer_of("qwen3"), talk_row("a", "one", "b", "two")
    pair = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": [{"role": "assistant", "content": "no"}]}
    with pytest.raises(Bad, match="renders earlier turns otherwise"):
        data.encode_row(tokenizer, pair, ("chosen", "rejected"), max_length=999)
    (found,) = data.encode_row(tokenizer, pair, ("chosen", "rejected"), max_length=999, learn_turns="last")
    assert [[known for _, known in runs] for runs in decoded(tokenizer, found)[1]] == [[False, True], [True]]
    ranking = {"prompt": row["prompt"], "completions": [pair["chosen"], pair["rejected"]]}
    (found,) = data.encode_row(tokenizer, ranking, ("completions",), max_length=999)
    whole = rendered(tokenizer, row["prompt"] + row["completion"], None, None)
    ids = found.prompt + found.responses[0]
    assert whole[: len(ids)] == ids and tokenizer.decode(whole[len(ids) :]) == "\n" and found.learned is None


def test_a_long_chat_loses_its_oldest_turns():
    tokenizer = tokenizer_of("chatml")
    system = {"role": "system", "content": "Be brief."}
    turns = [message for number in range(9) for message in turn(number)]
    row = {"prompt": data.Chat([system, *turns[:-1]]), "completion": [turns[-1]]}
    for kept in (9, 4, 1):  # turns that shall stay
        whole = rendered(tokenizer, [system, *turns[-2 * kept :]], None, None)
        (found,) = data.encode_row(tokenizer, row, ("completion",), max_length=len(whole) - 1)
        ids = found.prompt + found.responses[0]
        assert whole[: len(ids)] == ids and len(ids) == len(whole) - 1 and found.cut == (kept < 9)
    (short,) = data.encode_row(tokenizer, row, ("completion",), max_length=len(whole) - 3)
    assert short == found._replace(prompt=found.prompt[2:])
    pair = {"prompt": row["prompt"], "completions": [row["completion"], [{"role": "assistant", "content": "no"}]]}
    (found,) = data.encode_row(tokenizer, pair, ("completions",), max_length=len(whole) - 1)
    assert found.cut and found.prompt + found.responses[0] == ids
    for mode, error in (("drop", data.TooLong), ("error", Bad)):
        with pytest.raises(error, match=r"the prompt has \d+ tokens, longer than the \d+ that fit"):
            data.encode_row(tokenizer, row, ("completion",), max_length=len(whole), long_prompts=mode)


def turn(number):
    return {"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": f"Answer {number}."}


def test_learned_turns_are_left_out_with_the_oldest():
    tokenizer = tokenizer_of("chatml")
    turns = [message for number in range(5) for message in turn(number)]
    row = {"prompt": data.Chat(turns[:1]), "completion": turns[1:]}
    whole = rendered(tokenizer, turns[4:], None, None)
    (found,) = data.encode_row(tokenizer, row, ("completion",), max_length=len(whole))
    assert found.cut and tokenizer.decode(found.prompt + found.responses[0]) == tokenizer.decode(whole[:-1])
    assert [text for text, known in decoded(tokenizer, found)[1][0] if known] == [
        f"Answer {number}.<|im_end|>" for number in (2, 3, 4)
    ]


def test_a_turn_that_cannot_fit_leaves_the_others():
    """Where each turn is learned from a rendering of its own, and one of them is too long."""
    tokenizer = tokenizer_of("qwen3")
    row = talk_row("a", "one", "b", "word " * 200, "c", "two")
    found = data.encode_row(tokenizer, row, ("completion",), max_length=150)
    assert [tokenizer.decode(encoded.responses[0]).split("\n\n")[-1] for encoded in found] == [
        "two<|im_end|>",
        "one<|im_end|>",
    ]
    assert [encoded.cut for encoded in found] == [True, False]  # the row is told once
    whole = data.encode_row(tokenizer, talk_row("a", "one", "b", "two"), ("completion",), max_length=150)
    assert [encoded.cut for encoded in whole] == [False, False]
    with pytest.raises(data.TooLong):
        data.encode_row(tokenizer, talk_row("a", "word " * 200), ("completion",), max_length=150)


def test_completions_that_fit_are_named():
    row = {"prompt": data.Chat([{"role": "user", "content": "a"}]), "completions": ["b", "word " * 99, "c"]}
    with pytest.raises(data.TooLong) as caught:
        data.encode_row(tokenizer_of("chatml"), row, ("completions",), max_length=60)
    assert caught.value.fits == [0, 2]


def test_what_is_kept_of_a_tokenizer_is_not_what_it_gives_once_it_splits_special_tokens():
    first, second = (copy.deepcopy(tokenizer_of("chatml")) for _ in range(2))
    row, options = talk_row("a", "one"), {"max_length": 999}
    kept = data.encode_row(first, row, ("completion",), **options)
    first.split_special_tokens = second.split_special_tokens = True
    found, expected = (data.encode_row(each, row, ("completion",), **options) for each in (first, second))
    assert found == expected != kept


def test_a_tokenizer_without_offsets():
    """Written in Python, as those are that come with a model's own code."""
    fast = tokenizer_of("chatml")

    class Slow:
        is_fast = False

        def __getattr__(self, name):
            return getattr(fast, name)

        def __len__(self):
            return len(fast)

        def __call__(self, text, **options):
            assert not options.pop("return_offsets_mapping", False)
            return fast(text, **options)

    row = talk_row("a", "one\n\nand", "b", "two")
    assert data.encode_row(Slow(), row, ("completion",), max_length=999) == data.encode_row(
        fast, row, ("completion",), max_length=999
    )


def test_several_templates_by_name():
    plain, tools = tokenizer_of("chatml"), tokenizer_of("qwen2.5")
    both = type(plain)(tokenizer_object=tools.backend_tokenizer, eos_token="<|endoftext|>", pad_token="<pad>")
    both.chat_template = {"default": plain.chat_template, "tool_use": tools.chat_template}
    row = {"prompt": data.Chat(CONVERSATIONS["tools"][0], CONVERSATIONS["tools"][2]), "completion": "A rose."}
    (found,) = data.encode_row(both, row, ("completion",), max_length=999)
    assert "# Tools" in both.decode(found.prompt) and both.decode(found.responses[0]) == "A rose.<|im_end|>"
    (found,) = data.encode_row(both, talk_row("a", "b"), ("completion",), max_length=999)
    assert both.decode(found.prompt) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert both.convert_ids_to_tokens(data.end_of_turn_ids(both)) == ["<|im_end|>"]


def test_a_row_cannot_set_what_the_rendering_needs():
    row = {"prompt": data.Chat([{"role": "user", "content": "a"}], None, {"tokenize": True}), "completion": "b"}
    with pytest.raises(Bad, match="chat_template_kwargs: got tokenize, wants names that the template itself reads"):
        data.encode_row(tokenizer_of("chatml"), row, ("completion",), max_length=99)


def test_sampled_text_is_encoded_as_in_training():
    """Ended, the ids of the training; cut off, those of the text so far, without what ends a turn."""
    for name in ("llama-2", "qwen3", "gpt-oss", "chatml"):
        tokenizer, prompt = tokenizer_of(name), data.Chat([{"role": "user", "content": "a"}])
        (trained,) = data.encode_row(
            tokenizer, {"prompt": prompt, "completion": "A rose"}, ("completion",), max_length=99
        )
        assert data.encode_sampled(tokenizer, prompt, "A rose") == (trained.prompt, trained.responses[0])
        asked, cut = data.encode_sampled(tokenizer, prompt, "A rose", ended=False)
        text = tokenizer.decode(trained.responses[0]).partition("A rose")
        assert asked == trained.prompt and tokenizer.decode(cut) == text[0] + text[1]


PARTS = """
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- for part in m.content %}{% if part.type == 'text' %}{{- part.text }}{% endif %}{% endfor %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
FIRST_PART = PARTS.replace("{%- for part", "{%- set first = m.content[0].text + '' %}{%- for part")


def with_template(template):
    plain = tokenizer_of("chatml")
    tokenizer = type(plain)(tokenizer_object=plain.backend_tokenizer, eos_token="<|endoftext|>", pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [PARTS, FIRST_PART])  # of a string the one writes nothing, the other raises
def test_a_template_that_wants_parts_gets_them(template):
    tokenizer, row = with_template(template), talk_row("a", "one", "b", "two")
    messages = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in row["prompt"] + row["completion"]
    ]
    (found,) = data.encode_row(tokenizer, row, ("completion",), max_length=999)
    whole = rendered(tokenizer, messages, None, None)
    assert found.prompt == rendered(tokenizer, messages[:1], None, None, add_generation_prompt=True)
    assert found.prompt + found.responses[0] == whole[: -len(tokenizer("\n").input_ids)]
    assert [tokenizer.decode(part) for part in learned_parts(found)] == ["one<|im_end|>", "two<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(data.end_of_turn_ids(tokenizer)) == ["<|im_end|>"]
    begun = {"prompt": data.Chat([*row["prompt"], {"role": "assistant", "content": "So"}]), "completion": " one"}
    (found,) = data.encode_row(tokenizer, begun, ("completion",), max_length=999)
    assert tokenizer.decode(found.responses[0]) == " one<|im_end|>"


@pytest.mark.parametrize(
    ("answer", "field"),
    [
        ({"content": "A rose."}, "content"),
        ({"content": "rose"}, "content"),
        ({"content": "", "reasoning_content": "Let me see."}, "reasoning_content"),
    ],
)
def test_an_answer_that_the_template_leaves_out(answer, field):
    """It writes what users say, and of the answers one field that no row has."""
    tokenizer = with_template(PARTS.replace("m.content %}{% if", "m[{'user': 'content'}.get(m.role, 'x')] %}{% if"))
    row = {
        "prompt": data.Chat([{"role": "user", "content": "A rose"}]),
        "completion": [{"role": "assistant", **answer}],
    }
    with pytest.raises(Bad, match=f"the chat template does not write the {field} of an answer"):
        data.encode_row(tokenizer, row, ("completion",), max_length=999)
    pair = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": [{**row["completion"][0]}]}
    with pytest.raises(Bad, match=f"does not write the {field}"):
        data.encode_row(tokenizer, pair, ("chosen", "rejected"), max_length=999)


READS_DICTS = """
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- for call in m.tool_calls or [] %}{{- call.function.name + (call.function.arguments | tojson) }}{% endfor %}
{{- (m.content or '') + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
READS_TEXT = READS_DICTS.replace("(call.function.arguments | tojson)", "call.function.arguments")


@pytest.mark.parametrize("template", [READS_DICTS, READS_TEXT])
@pytest.mark.parametrize("arguments", [{"what": "an owl"}, '{"what":"an owl"}'])
def test_arguments_of_calls_are_given_as_the_template_reads_them(template, arguments):
    """As text, where they are text, they would be JSON in JSON; some templates take nothing but text."""
    tokenizer = with_template(template)
    call = {"type": "function", "function": {"name": "find", "arguments": arguments}}
    row = {
        "prompt": data.Chat([{"role": "user", "content": "a"}]),
        "completion": [{"role": "assistant", "content": "", "tool_calls": [call]}],
    }
    (found,) = data.encode_row(tokenizer, row, ("completion",), max_length=999)
    as_it_is = template == READS_TEXT and isinstance(arguments, str)
    expected = arguments if as_it_is else '{"what": "an owl"}'
    assert tokenizer.decode(found.responses[0]) == f"find{expected}<|im_end|>"
    assert call["function"]["arguments"] == arguments


@pytest.mark.parametrize(
    ("name", "text", "fields"),
    [
        ("chatml", "A rose.", {"content": "A rose."}),
        ("llama-2", " A rose.", {"content": "A rose."}),
        ("qwen3", "<think>\n\n</think>\n\nA rose.", {"content": "A rose."}),
        ("qwen3", "<think>\nHm.\n</think>\n\nA rose.", {"reasoning_content": "Hm.", "content": "A rose."}),
        ("qwen3", "<think>\nHm, and", {"content": "<think>\nHm, and"}),
        ("qwen3", "A rose.", {"content": "A rose."}),
        ("qwen3.5", "Hm.\n</think>\n\nA rose.", {"reasoning_content": "Hm.", "content": "A rose."}),
        ("gpt-oss", "<|channel|>final<|message|>A rose.", {"content": "A rose."}),
        (
            "gpt-oss",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>A rose.",
            {"reasoning_content": "Hm.", "content": "A rose."},
        ),
        ("gpt-oss", "<|channel|>other<|message|>A rose.", {"content": "otherA rose."}),
    ],
)
def test_a_sampled_text_is_a_message(name, text, fields):
    prompt = data.Chat([{"role": "user", "content": "a"}])
    assert data.answer_of(tokenizer_of(name), prompt, text) == {"role": "assistant", **fields}


def test_a_sampled_text_goes_on_from_a_begun_answer():
    prompt = data.Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "A"}])
    found = data.answer_of(tokenizer_of("qwen3"), prompt, " rose.<|im_start|>")
    assert found == {"role": "assistant", "content": " rose."}


def test_a_token_that_takes_in_the_space_behind_it_stays_in_the_prompt():
    """As Phi 3's do: of an answer that begins with space that space is gone, and the ids before it are the prompt's."""
    tokenizer = copy.deepcopy(tokenizer_of("falcon"))
    special = [AddedToken(token, special=True, rstrip=True, normalized=False) for token in FAMILIES["phi-3"].special]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.chat_template = FAMILIES["phi-3"].template
    row = talk_row("a", "\n b", "c", " d")
    (found,) = data.encode_row(tokenizer, row, ("completion",), max_length=99)
    assert found.prompt == rendered(tokenizer, row["prompt"], None, None, add_generation_prompt=True)
    assert [tokenizer.decode(part) for part in learned_parts(found)] == ["b<|end|>", "d<|end|>"]
    whole = rendered(tokenizer, row["prompt"] + row["completion"], None, None)
    assert whole[:-1] == found.prompt + found.responses[0]
