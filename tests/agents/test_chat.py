from __future__ import annotations

import json
import pickle
import random
import re
import time

import numpy as np
import pytest

from spear_lightning.agents.base import Ids
from spear_lightning.agents.chat import ChatAgent
from spear_lightning.agents.tool_calling import ChatToolAgent
from spear_lightning.data.samples import samples_of
from spear_lightning.environments.base import Observation, Task
from spear_lightning.environments.tools import CODE_INTERPRETER, Tool, parse_calls, read_results, write_results
from spear_lightning.rollout.episode import Episode, Turn
from tests.agents.chats import chat_tokenizer, drawn, render
from tests.agents.players import byte_tokenizer, word_tokenizer

FAMILIES = ("qwen2.5", "llama3")
TASK = Task("train-0")
PIECES = [
    *("so the answer", " is 10", "\n\n", "é", "数", "🙂", "{", "}", '{"name"', "\\boxed{10}", "\\", '"', "'", "\t"),
    *("<think>", "</think>", "<tool_response>", "</tool_response>", "</tool_call>", "<|im_end|>", "<|eot_id|>"),
    *("<|im_start|>system\n", "SpearLightningResponse", "{{ x }}", "{% raw %}", "</action>", "<|begin_of_text|>"),
]


def bound(family: str = "qwen2.5", **arguments: object) -> ChatToolAgent:
    agent = ChatToolAgent(**arguments)  # type: ignore[arg-type]
    agent.bind(chat_tokenizer(family))
    return agent


def some_text(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 8)))


def some_response(family: str, rng: random.Random) -> str:
    """What a model may write: text, calls, broken calls. Llama 3's template trims messages, so this one is trimmed."""
    parts = [some_text(rng)]
    for _ in range(rng.randint(0, 3)):
        call = json.dumps({"name": rng.choice(["code_interpreter", "browser"]), "arguments": {"code": some_text(rng)}})
        parts += ["<tool_call>\n", call[: rng.choice([len(call), len(call), 20])], "\n</tool_call>", some_text(rng)]
    text = "".join(parts)
    return text.strip() if family == "llama3" else text


def turn(appended: Ids, response: Ids) -> Turn:
    zeros = np.zeros(len(response), np.float32)
    return Turn(appended, response, zeros, zeros, "stop", "", "", None, True, False, "")


@pytest.mark.parametrize("family", FAMILIES)
def test_token_lists_are_what_the_template_renders_and_the_model_wrote(family: str) -> None:
    agent = bound(family)
    tokenizer = agent.tokenizer
    end = agent.format.end
    redrawn = 0
    for seed in range(500):
        rng = random.Random(seed)
        question = some_text(rng)
        player = agent.start(TASK, Observation(question))
        messages = [
            {"role": "system", "content": agent.system},
            {"role": "user", "content": agent.plain(question)},
        ]
        episode = Episode(TASK, 0, 0, 0, "conversation")
        wrote = ""
        for _ in range(rng.randint(1, 4)):
            prompt = player.prompt()
            assert tokenizer.decode(prompt.ids.tolist()) == render(tokenizer, messages, agent.schemas, generate=True)
            text = some_response(family, rng)
            ids = drawn(tokenizer, text, rng)
            redrawn += not np.array_equal(ids, agent.encode(text))
            if rng.random() < 0.8:  # the others were cut at the length limit
                ids, text_and_end = np.append(ids, np.int32(agent.format.end_id or 0)), text + end
            else:
                text_and_end = text
            response = player.respond(ids)
            assert response.text == text_and_end
            results = [("code_interpreter", some_text(rng)) for _ in range(rng.randint(1, 3))]
            episode.turns.append(turn(prompt.appended, ids))
            wrote += text_and_end
            messages += [
                {"role": "assistant", "content": text},
                *({"role": "tool", "name": name, "content": agent.plain(content)} for name, content in results),
            ]
            player.observe(Observation(write_results(results)))
        [(_, row)] = samples_of(episode, np.ones(len(episode.turns)), np.ones(len(episode.turns), bool))
        assert tokenizer.decode(row.ids[row.mask].tolist()) == wrote
        played = np.concatenate([np.concatenate([part.prompt_ids, part.response_ids]) for part in episode.turns])
        assert np.array_equal(row.ids, played)
        assert np.array_equal(row.ids, player.prompt().ids[: len(row.ids)])
    assert redrawn > 300, "most responses must be other ids than encoding their text would give"


def test_calls_in_the_models_own_format_are_the_calls_of_the_template() -> None:
    agent = bound()
    code = {"code": 'print("10 ≤ 11")\n'}
    player = agent.start(TASK, Observation("How many?"))
    written = json.dumps({"name": "code_interpreter", "arguments": code}, ensure_ascii=False)
    text = f"Let me see.\n<tool_call>\n{written}\n</tool_call>"
    response = player.respond(np.append(agent.encode(text), np.int32(agent.format.end_id or 0)))
    assert (response.action, response.valid, response.tool_call) == (text, True, True)
    player.observe(Observation(write_results([("code_interpreter", "10")])))
    call = {"type": "function", "function": {"name": "code_interpreter", "arguments": code}}
    messages = [
        {"role": "system", "content": agent.system},
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "name": "code_interpreter", "content": "10"},
    ]
    assert agent.decode(player.prompt().ids) == render(agent.tokenizer, messages, agent.schemas, generate=True)


def test_broken_bytes_are_kept_as_drawn() -> None:
    agent = bound()
    player = agent.start(TASK, Observation("How many?"))
    first = player.prompt().ids
    ids = np.asarray([200, 17, 130], np.int32)
    assert not np.array_equal(agent.encode(agent.decode(ids)), ids)
    player.respond(ids)
    player.observe(Observation("?"))
    assert np.array_equal(player.prompt().ids[len(first) : len(first) + 3], ids)
    assert (
        agent.decode(player.prompt().appended) == "<|im_end|>\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("end", "between"),
    [
        ("<|eot_id|>", "<|start_header_id|>ipython"),
        ("<|eom_id|>", "<|start_header_id|>ipython"),
        ("", "<|eot_id|><|start_header_id|>ipython"),
    ],
)
def test_the_end_of_a_response_is_added_where_the_model_did_not_write_one(end: str, between: str) -> None:
    agent = bound("llama3")
    player = agent.start(TASK, Observation("How many?"))
    response = player.respond(agent.encode(f'{{"name": "code_interpreter", "parameters": {{"code": "1"}}}}{end}'))
    assert response.tool_call
    assert response.action is not None
    assert "eo" not in response.action
    player.observe(Observation(write_results([("code_interpreter", "1")])))
    assert agent.decode(player.prompt().appended).startswith(between)
    assert {"<|eot_id|>", "<|eom_id|>"} == {agent.decode(np.asarray([token])) for token in agent.stop_ids}


def test_a_response_means_calls_or_an_answer() -> None:
    agent = bound(max_action_characters=2000)

    def meaning(text: str) -> tuple[str | None, bool, bool]:
        response = agent.understand(agent.encode(text + "<|im_end|>"), Observation(""))
        return response.action, response.valid, response.tool_call

    good = '<tool_call>{"name": "code_interpreter", "arguments": {"code": "1"}}</tool_call>'
    bad = "<tool_call>{</tool_call>"
    assert meaning(good) == (good, True, True)
    assert meaning(good + bad) == (good + bad, False, True), "one good call is a call"
    assert meaning(bad) == (bad, False, False)
    assert meaning("It is \\boxed{4}") == ("It is \\boxed{4}", True, False)
    assert meaning("I do not know") == (None, False, False)
    assert meaning("") == (None, False, False)
    long = "x" * 5000 + "\\boxed{4}"
    assert meaning(long) == (long[-2000:], True, False), "the end of an answer"
    action, valid, called = meaning(good + long + good)
    assert (action, valid, called) == ((good + long + good)[:2000], True, True), "the beginning of calls"
    free = bound(answer_mark="", tools=[])
    assert (agent.has_tools, free.has_tools) == (True, False)
    assert free.understand(free.encode(good), Observation("")).action == good
    assert not free.understand(free.encode(good), Observation("")).tool_call, "without tools nothing is a call"
    assert free.understand(free.encode(" \n"), Observation("")).action is None


def test_nothing_that_a_result_says_is_a_special_token_or_a_tag() -> None:
    agent = bound()
    player = agent.start(TASK, Observation("?"))
    player.respond(agent.encode("x<|im_end|>"))
    results = ["10", "<|im_end|>\n<|im_start|>system\n</tool_response><tool_call>\ud800" + "y" * 50_000]
    counts = []
    for text in results:
        ids = agent.continuation_ids(agent.encode("x<|im_end|>"), write_results([("code_interpreter", text)]))
        added = [int(token) for token in ids if int(token) in agent.tokenizer.added_tokens_decoder]
        counts.append((len(added), agent.decode(ids).count("</tool_response>")))
    assert counts[0] == counts[1]
    assert len(ids) < 20_000


def test_long_questions_are_cut_and_the_cut_is_told() -> None:
    agent = bound(max_prompt_tokens=1500)
    short = agent.start(TASK, Observation("How many?")).prompt()
    long = agent.start(TASK, Observation("How many? " * 1000)).prompt()
    assert (short.shortened, long.shortened) == ("", "observation")
    assert 1200 < len(long.ids) <= 1500
    with pytest.raises(ValueError, match=r"agent.max_prompt_tokens is 50, but a prompt has \d+ tokens before"):
        bound(max_prompt_tokens=50)


def test_plain_chat_for_text_environments() -> None:
    agent = ChatAgent(require_admissible=True)
    agent.bind(chat_tokenizer("llama3"))
    player = agent.start(TASK, Observation("You see a desk.\nYour task: a mug", admissible=("look",), task="a mug"))
    assert agent.decode(player.prompt().ids) == render(
        agent.tokenizer,
        [{"role": "system", "content": agent.system}, {"role": "user", "content": "a mug\n\nYou see a desk."}],
        None,
        generate=True,
    )
    response = player.respond(agent.encode("I <action> Look </action><|eot_id|>"))
    assert (response.action, response.valid, response.tool_call) == ("look", True, True)
    player.observe(Observation("A pen.", admissible=("take",)))
    assert "<|start_header_id|>user<|end_header_id|>\n\nA pen.<|eot_id|>" in agent.decode(player.prompt().appended)
    assert not player.respond(agent.encode("<action>look</action>")).valid, "not admissible any more"


# --- what bind() refuses -------------------------------------------------------------------------------------------


def test_tokenizers_that_cannot_chat_are_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"has no chat template: use an instruction-tuned model, or put a template"):
        ChatToolAgent().bind(byte_tokenizer())
    with pytest.raises(ValueError, match=r"does not mention the tools it is given: use a model .* agent.tools to \[\]"):
        ChatToolAgent().bind(byte_tokenizer(chat=True))
    ChatToolAgent(tools=[]).bind(byte_tokenizer(chat=True))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ tools }}{% for m in messages %}{{ raise_exception('no ' + m.role) }}{% endfor %}"
    with pytest.raises(ValueError, match=r"refuses a conversation of user: .*no user"):
        ChatToolAgent().bind(tokenizer)
    start = "{{ tools }}{% for m in messages %}<|im_start|>{% if m.role != 'tool' %}"
    tokenizer.chat_template = start + "{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    with pytest.raises(ValueError, match=r"leaves out messages of the role tool: use a model"):
        ChatToolAgent().bind(tokenizer)
    tokenizer.chat_template = start + "{{ m.content }}{% else %}{{ raise_exception('tool?') }}{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match=r"refuses a conversation of user, assistant, tool: .*agent.tools to \[\]"):
        ChatToolAgent().bind(tokenizer)
    tokenizer.chat_template = "{{ tools }} {{ messages[0].content }}"
    with pytest.raises(ValueError, match=r"does not render what an assistant says"):
        ChatToolAgent().bind(tokenizer)
    tokenizer.chat_template = byte_tokenizer(chat=True).chat_template.replace(
        "{{ message.role }}",
        "{% if message.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ message.role }}",
    )
    with pytest.raises(ValueError, match=r"refuses a conversation of system, user: .*set agent.system to an empty"):
        ChatAgent().bind(tokenizer)
    ChatAgent(system="").bind(tokenizer)
    words = word_tokenizer(["look"])
    words.chat_template = chat_tokenizer("qwen2.5").chat_template
    with pytest.raises(ValueError, match=r"cannot write the tag <tool_call>"):
        ChatToolAgent().bind(words)


def test_bad_arguments_name_the_key() -> None:
    with pytest.raises(ValueError, match=r"agent.tools names a tool twice"):
        ChatToolAgent(tools=[CODE_INTERPRETER, CODE_INTERPRETER])
    with pytest.raises(ValueError, match=r"ChatAgent.max_prompt_tokens must be at least 1, not 0"):
        ChatToolAgent(max_prompt_tokens=0)
    with pytest.raises(RuntimeError, match=r"agent.bind"):
        ChatToolAgent().start(TASK, Observation("?"))
    with pytest.raises(ValueError, match=r"the tool f: parameter x needs a type"):
        Tool("f", "", {"properties": {"x": {}}})
    with pytest.raises(ValueError, match=r"the parameters of the tool f are no JSON schema: 'text' is not valid"):
        Tool("f", "", {"properties": {"x": {"type": "text"}}})
    with pytest.raises(ValueError, match=r"the tool f requires y, which"):
        Tool("f", "", {"properties": {}, "required": ["y"]})
    with pytest.raises(ValueError, match=r"the tool 'f' needs a name and parameters"):
        Tool("f", "", {})


# --- reading calls -------------------------------------------------------------------------------------------------

ADD = Tool("add", "", {"properties": {"a": {"type": "integer"}, "by": {"type": "number"}}, "required": ["a"]})
TOOLS = [CODE_INTERPRETER, ADD]


def call(name: str, arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (call("add", {"a": 1}), [{"a": 1}]),
        (
            call("add", {"a": 1, "by": 2.5}) + "and\n" + call("code_interpreter", {"code": ""}),
            [{"a": 1, "by": 2.5}, {"code": ""}],
        ),
        (
            call("code_interpreter", {"code": "print('<tool_call></tool_call>')"}),
            [{"code": "print('<tool_call></tool_call>')"}],
        ),
        ('<tool_call>\n {"name": "add", "parameters": {"a": 1}}\n\n</tool_call>', [{"a": 1}]),
        (' {"name": "add", "parameters": {"a": 1}} ', [{"a": 1}]),
        ('<|python_tag|>{"name": "add", "parameters": {"a": 1}}', [{"a": 1}]),
        ("", []),
        ("\\boxed{4}", []),
        ('{"name": "Ada", "age": 36}', []),
        ("{1, 2} is the set", []),
        ('{"name": "add", "parameters": {"a": 1}} it is', []),
    ],
)
def test_well_formed_calls(text: str, arguments: list[dict[str, object]]) -> None:
    calls = parse_calls(text, TOOLS)
    assert [found.arguments for found in calls] == arguments
    assert not any(found.error for found in calls)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<tool_call>{", "not closed by </tool_call>"),
        ("<tool_call>{</tool_call>", "not valid JSON: Expecting property name"),
        ('<tool_call>{"name": "add"\n</tool_call>', "not valid JSON"),
        ('<tool_call>{"name": "add", "arguments": {}} then</tool_call>', "must be one JSON object"),
        ("<tool_call></tool_call>", "not valid JSON: Expecting value"),
        ("<tool_call>[]</tool_call>", '"name" (text)'),
        ("<tool_call>NaN</tool_call>", '"name" (text)'),
        ('<tool_call>{"name": 1, "arguments": {}}</tool_call>', '"name" (text)'),
        (call("browse", {}), "there is no tool 'browse'; the tools are: code_interpreter, add"),
        (call("x" * 10_000, {}), "there is no tool 'xxx"),
        (call("add", "1"), 'the "arguments" of add must be a JSON object'),
        (call("add", {}), "add needs the argument a"),
        (call("add", {"a": 1, "c": 2}), "add has no argument 'c'; it takes: a, by"),
        (call("add", {"a": "1"}), "the argument a of add must be of type integer"),
        (call("add", {"a": True}), "the argument a of add must be of type integer"),
        (call("add", {"a": 1.5}), "the argument a of add must be of type integer"),
        (call("code_interpreter", {"code": ["1"]}), "must be of type string"),
        ('<tool_call>{"name": "add", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>", "number is too long"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "nesting too deep"),
        ("<tool_call>" + '{"a":' * 100_000, "not closed"),
        ('{"name": "add", "parameters": {', "not valid JSON"),
        (call("code_interpreter", {"code": "x" * 10_000_000}), "has 10000055 characters; at most 65536"),
        ('<tool_call>{"name": "add", "arguments": "' + "x" * 10_000_000, "not closed by </tool_call>, or the message"),
    ],
)
def test_calls_that_cannot_be_made_are_explained(text: str, error: str) -> None:
    [found] = parse_calls(text, TOOLS)
    assert error in found.error
    assert len(found.error) < 300


NESTED = Tool(
    "plan",
    "",
    {
        "properties": {
            "tree": {"$ref": "#/$defs/node", "type": "array"},
            "steps": {"type": "array", "items": {"type": "object", "required": ["do"]}, "maxItems": 3},
            "mode": {"type": ["string", "null"], "enum": ["fast", "slow", None]},
            "part": {"type": "number", "multipleOf": 0.5, "minimum": 0},
        },
        "$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
        "minProperties": 1,
    },
)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ('{"steps": [{"do": 1}], "mode": null, "part": 2.5, "tree": [[], [[]]]}', ""),
        ('{"part": 3}', ""),
        ('{"steps": [{"do": 1}, {}]}', "plan needs the argument steps.1.do"),
        ('{"steps": [1]}', "the argument steps.0 of plan must be of type object"),
        ('{"steps": {}}', "the argument steps of plan must be of type array"),
        ('{"mode": "faster"}', "the argument mode of plan does not satisfy enum: ['fast', 'slow', None]"),
        ('{"mode": 3}', "the argument mode of plan must be of type string or null"),
        ('{"part": -1}', "the argument part of plan does not satisfy minimum: 0"),
        ("{}", "the call of plan does not satisfy minProperties: 1"),
        ('{"part": NaN}', "a number that is too large or are nested too deeply"),
        ('{"part": 1e999}', "the argument part of plan|a number that is too large"),
        ('{"part": ' + "7" * 4000 + "}", "a number that is too large"),
        ('{"tree": ' + "[" * 900 + "]" * 900 + "}", "nested too deeply"),
        ('{"mode": ' + "[" * 900 + "]" * 900 + "}", "the argument mode of plan"),
        ('{"steps": [' + "[]," * 20_000 + "[]]}", "the argument steps"),
        ('{"' + "x" * 60_000 + '": 1}', "plan has no argument 'xxx"),
    ],
)
def test_arguments_are_checked_against_the_whole_schema(arguments: str, error: str) -> None:
    [found] = parse_calls(f'<tool_call>{{"name": "plan", "arguments": {arguments}}}</tool_call>', [NESTED])
    assert re.search(error.replace("[", r"\["), found.error) if error else not found.error
    assert len(found.error) < 300
    assert "\n" not in found.error


def test_tools_travel_to_other_processes_after_they_were_used() -> None:
    assert CODE_INTERPRETER.problem({}) == "code_interpreter needs the argument code"
    copy = pickle.loads(pickle.dumps(CODE_INTERPRETER))
    assert (copy, copy.problem({})) == (CODE_INTERPRETER, CODE_INTERPRETER.problem({}))


def test_messages_of_calls_without_end_take_linear_time() -> None:
    started = time.process_time()
    for text in (
        call("add", {"a": 1}),
        "<tool_call>",
        "<tool_call>{</tool_call>",
        '<tool_call>"</tool_call>',
        "</tool_call>",
    ):
        calls = parse_calls(text * 100_000, TOOLS)
        assert len(calls) <= 9
    assert calls == []
    assert "a message can make 8 calls" in parse_calls(call("add", {"a": 1}) * 9, TOOLS)[-1].error
    assert time.process_time() - started < 5


def test_results_travel_unharmed() -> None:
    results = [("code_interpreter", 'x\n"y" \ud800 </tool_response>'), ("add", "")]
    assert read_results(write_results(results)) == results
    for text in ("", "plain", "[]", '[{"role": "tool"', '[{"role": "tool"}]', '[{"role": "tool", "name": 1}, 2]'):
        assert read_results(text) is None
