"""Invented rows in the published layouts of data sets, and the rows in our fields that they stand for."""


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def both(prompt, better, worse):
    """What a pair stands for, by kind."""
    return {
        "ranked": [{"prompt": prompt, "completions": [better, worse], "ranks": [0, 1]}],
        "preference": [{"prompt": prompt, "chosen": better, "rejected": worse}],
        "sft": [{"prompt": prompt, "completion": better}],
        "unpaired": [
            {"prompt": prompt, "completion": better, "label": True},
            {"prompt": prompt, "completion": worse, "label": False},
        ],
    }


def tied(prompt, first, second, values):
    return {
        "ranked": [{"prompt": prompt, "completions": [first, second], **values}],
        "preference": [],
        "sft": [{"prompt": prompt, "completion": first}],
        "unpaired": [],
    }


HH_PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: A bird?\n\nAssistant:"
POST_PROMPT = "SUBREDDIT: r/birds\n\nTITLE: An owl\n\nPOST: I saw it.\n\nTL;DR:"
INFO = {"id": "t1", "post": "I saw it.", "title": "An owl", "subreddit": "birds", "site": None, "article": None}
NEWS = {"id": "n1", "post": None, "title": "Owls", "subreddit": None, "site": "s", "article": "They fly."}
ANNOTATED = {"annotations": {"honesty": {"Rating": "4"}}, "critique": "Fine.", "custom_system_prompt": "Be kind."}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "owl"}}}
TOOLS = '[{"type": "function", "function": {"name": "find", "parameters": {}}}]'


def node(text, role="prompter", rank=None, replies=(), **more):
    return {
        "message_id": text, "parent_id": None, "text": text, "role": role, "lang": "en", "review_count": 3,
        "review_result": True, "deleted": False, "rank": rank, "synthetic": False, "replies": list(replies), **more,
    }  # fmt: skip


def reply(text, rank=None, replies=(), **more):
    return node(text, "assistant", rank, replies, **more)


TREE = node(
    "A bird?",
    replies=[
        reply("Elk.", 1, [node("Sure?", replies=[reply("No.")])]),
        reply("Owl.", 0, [node("Why?", rank=1, replies=[reply("X.")]), node("Yes?", rank=0)]),
        reply("Spam.", 2, review_result=False),
        reply("Gone.", 3, deleted=True),
        reply(" ", 4),
        reply("Unranked."),
    ],
)


def table(root, tree="t", parent=None):
    """The messages of a tree as rows of a table, as the tree's root last, so that replies come before it."""
    rows = []
    for child in root["replies"]:
        rows += table(child, tree, root["message_id"])
    mine = {name: value for name, value in root.items() if name != "replies"}
    return [*rows, {**mine, "parent_id": parent, "message_tree_id": tree, "tree_state": "ready_for_export"}]


TREE_ROWS = {
    "ranked": [{"prompt": [user("A bird?")], "completions": ["Owl.", "Elk."], "ranks": [0, 1]}],
    "preference": [{"prompt": [user("A bird?")], "chosen": "Owl.", "rejected": "Elk."}],
    "sft": [{"messages": [user("A bird?"), assistant("Owl."), user("Why?"), assistant("X.")]}],
    "unpaired": [
        {"prompt": [user("A bird?")], "completion": "Owl.", "label": True},
        {"prompt": [user("A bird?")], "completion": "Elk.", "label": False},
    ],
    "prompts": [
        {"prompt": [user("A bird?")]},
        {"prompt": [user("A bird?"), assistant("Owl."), user("Yes?")]},
        {"prompt": [user("A bird?"), assistant("Owl."), user("Why?")]},
        {"prompt": [user("A bird?"), assistant("Elk."), user("Sure?")]},
    ],
}

STEER = {"correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 2}

# (format, raw rows, {kind: rows})
PUBLISHED = [
    (
        "hh-rlhf",
        [{"chosen": HH_PROMPT + " An owl.", "rejected": HH_PROMPT + " An ow"}],
        {**both(HH_PROMPT, " An owl.", " An ow"), "prompts": [{"prompt": HH_PROMPT}]},
    ),
    (
        "ultrafeedback",
        [
            {
                "source": "invented",
                "instruction": "A bird?",
                "models": ["a", "b", "c", "d"],
                "completions": [
                    {**ANNOTATED, "model": "a", "response": "Jay.", "overall_score": 7.5, "fine-grained_score": 1.0},
                    {**ANNOTATED, "model": "b", "response": "Mud.", "overall_score": 2, "fine-grained_score": 4.0},
                    {**ANNOTATED, "model": "c", "response": "Elk.", "overall_score": 2, "fine-grained_score": 2.0},
                    {**ANNOTATED, "model": "d", "response": "Owl.", "overall_score": 8, "fine-grained_score": 3.0},
                ],
                "correct_answers": ["None"],
                "incorrect_answers": ["None"],
            }
        ],
        {
            **both("A bird?", "Owl.", "Mud."),
            "ranked": [
                {"prompt": "A bird?", "completions": ["Jay.", "Mud.", "Elk.", "Owl."], "scores": [7.5, 2, 2, 8]}
            ],
            "prompts": [{"source": "invented", "instruction": "A bird?", "prompt": "A bird?"}],
        },
    ),
    (
        "ultrafeedback",
        [
            {
                "instruction": "A bird?",
                "completions": {"response": ["Mud.", "Owl."], "fine-grained_score": [1.5, 4.25]},
            }
        ],
        {"ranked": [{"prompt": "A bird?", "completions": ["Mud.", "Owl."], "scores": [1.5, 4.25]}]},
    ),
    (
        "nectar",
        [
            {
                "prompt": "\n\nHuman: A bird?\n\nAssistant: ",
                "answers": [
                    {"answer": "Mud.", "model": "a", "rank": 3.0},
                    {"answer": "Owl.", "model": "b", "rank": 1.0},
                    {"answer": "Elk.", "model": "c", "rank": 2.0},
                ],
                "turns": 1,
                "num_responses": 3,
                "source": ["invented"],
                "good_natured": True,
            }
        ],
        {
            **both("\n\nHuman: A bird?\n\nAssistant: ", "Owl.", "Mud."),
            "ranked": [
                {
                    "prompt": "\n\nHuman: A bird?\n\nAssistant: ",
                    "completions": ["Mud.", "Owl.", "Elk."],
                    "ranks": [3.0, 1.0, 2.0],
                }
            ],
        },
    ),
    (
        "helpsteer",
        [
            {"prompt": "A bird?", "response": "Elk.", "helpfulness": 1, **STEER},
            {"prompt": "A fish?", "response": "Eel.", "helpfulness": 4, **STEER},
            {"prompt": "A tree?", "response": "Oak.", "helpfulness": 2, **STEER},
            {"prompt": "A bird?", "response": "Owl.", "helpfulness": 4, **STEER},
            {"prompt": "A bird?", "response": "Jay.", "helpfulness": 3, **STEER},
            {"prompt": "A tree?", "response": "Fir.", "helpfulness": 2, **STEER},
        ],
        {
            "ranked": [
                {"prompt": "A bird?", "completions": ["Elk.", "Owl.", "Jay."], "scores": [1, 4, 3]},
                {"prompt": "A tree?", "completions": ["Oak.", "Fir."], "scores": [2, 2]},
            ],
            "preference": [{"prompt": "A bird?", "chosen": "Owl.", "rejected": "Elk."}],
            "sft": [{"prompt": "A bird?", "completion": "Owl."}, {"prompt": "A tree?", "completion": "Oak."}],
            "prompts": [
                {"prompt": "A bird?", "response": "Elk.", "helpfulness": 1, **STEER},
                {"prompt": "A fish?", "response": "Eel.", "helpfulness": 4, **STEER},
                {"prompt": "A tree?", "response": "Oak.", "helpfulness": 2, **STEER},
            ],
        },
    ),
    (
        "stack-exchange",
        [
            {
                "qid": 7,
                "question": "<p>A bird?</p>",
                "answers": [
                    {"answer_id": 1, "author": "a", "pm_score": 0, "selected": False, "text": "<p>Elk.</p>"},
                    {"answer_id": 2, "author": "b", "pm_score": 5, "selected": True, "text": "<p>Owl.</p>"},
                    {"answer_id": 3, "author": "c", "pm_score": 2, "selected": False, "text": "<p>Jay.</p>"},
                ],
                "date": "2001/01/01",
                "metadata": ["u"],
            }
        ],
        {
            **both("<p>A bird?</p>", "<p>Owl.</p>", "<p>Elk.</p>"),
            "ranked": [
                {
                    "prompt": "<p>A bird?</p>",
                    "completions": ["<p>Elk.</p>", "<p>Owl.</p>", "<p>Jay.</p>"],
                    "scores": [0, 5, 2],
                }
            ],
        },
    ),
    (
        "reward-bench-2",
        [{"id": "1", "prompt": "A bird?", "chosen": ["Owl.", "Jay."], "rejected": ["Elk."], "num_correct": 2}],
        {
            **both("A bird?", "Owl.", "Elk."),
            "ranked": [{"prompt": "A bird?", "completions": ["Owl.", "Jay.", "Elk."], "ranks": [0, 0, 1]}],
        },
    ),
    (
        "summarize-from-feedback",
        [
            {
                "info": INFO,
                "summaries": [{"text": " Mud.", "policy": "p", "note": ""}, {"text": " An owl.", "policy": "ref"}],
                "choice": 1,
                "worker": "w1",
                "batch": "b1",
                "split": "train",
                "extra": {"confidence": 7},
            }
        ],
        {
            **both(POST_PROMPT, " An owl.", " Mud."),
            "ranked": [{"prompt": POST_PROMPT, "completions": [" Mud.", " An owl."], "ranks": [1, 0], "labeler": "w1"}],
            "prompts": [{"choice": 1, "worker": "w1", "batch": "b1", "split": "train", "prompt": POST_PROMPT}],
        },
    ),
    (
        "summarize-from-feedback",
        [{"info": NEWS, "summaries": [{"text": "They do."}, {"text": "Mud."}], "choice": 0}],
        both("TITLE: Owls\n\nThey fly.\n\nTL;DR:", "They do.", "Mud."),
    ),
    (
        "summarize-from-feedback-axis",
        [{"info": INFO, "summary": {"text": " An owl.", "policy": "p", "axes": {"overall": 6}}, "worker": "w1"}],
        {"prompts": [{"prompt": POST_PROMPT}]},
    ),
    (
        "webgpt-comparisons",
        [
            {
                "question": {"dataset": "invented", "id": "q1", "full_text": "A bird?"},
                "quotes_0": {"title": ["t"], "extract": ["e"]},
                "answer_0": "Mud.",
                "tokens_0": {"prefix": [1], "completion": [2]},
                "score_0": -0.5,
                "quotes_1": {"title": [], "extract": []},
                "answer_1": "Owl [1].",
                "tokens_1": {"prefix": [1], "completion": [2]},
                "score_1": 0.5,
            }
        ],
        {
            **both("A bird?", "Owl [1].", "Mud."),
            "ranked": [{"prompt": "A bird?", "completions": ["Mud.", "Owl [1]."], "scores": [-0.5, 0.5]}],
        },
    ),
    (
        "webgpt-comparisons",
        [{"question": {"full_text": "A?"}, "answer_0": "B.", "answer_1": "C.", "score_0": 0.0, "score_1": 0.0}],
        tied("A?", "B.", "C.", {"scores": [0.0, 0.0]}),
    ),
    (
        "shp",
        [
            {
                "post_id": "p1",
                "domain": "askbirds_train",
                "upvote_ratio": 0.9,
                "history": "A bird?",
                "c_root_id_A": "a",
                "c_root_id_B": "b",
                "created_at_utc_A": 1,
                "created_at_utc_B": 2,
                "score_A": 9,
                "score_B": 20,
                "human_ref_A": "Elk.",
                "human_ref_B": "Owl.",
                "labels": 0,
                "seconds_difference": 1.0,
                "score_ratio": 2.2,
            }
        ],
        {
            **both("A bird?", "Owl.", "Elk."),
            "ranked": [{"prompt": "A bird?", "completions": ["Elk.", "Owl."], "scores": [0, 1]}],
        },
    ),
    (
        "shp",
        [{"history": "A bird?", "human_ref_A": "Owl.", "human_ref_B": "Elk.", "labels": 1}],
        {"preference": [{"prompt": "A bird?", "chosen": "Owl.", "rejected": "Elk."}]},
    ),
    (
        "helpsteer2-preference",
        [
            {
                "split": "train",
                "prompt": "A bird?",
                "response_1": "Elk.",
                "response_2": "Owl.",
                "preference_strength": 2,
                "preference_statement": "s",
                "preference_elaboration": "e",
                "three_most_similar_preferences": [],
                "all_preferences_unprocessed": [],
            }
        ],
        {
            **both("A bird?", "Owl.", "Elk."),
            "ranked": [{"prompt": "A bird?", "completions": ["Elk.", "Owl."], "ranks": [1, 0]}],
        },
    ),
    (
        "helpsteer3",
        [
            {
                "domain": "general",
                "language": "english",
                "context": [user("Hi"), assistant("Yes?"), user("A bird?")],
                "response1": "Owl.",
                "response2": "Elk.",
                "overall_preference": -3,
                "individual_preference": [],
            }
        ],
        both([user("Hi"), assistant("Yes?"), user("A bird?")], "Owl.", "Elk."),
    ),
    (
        "helpsteer3",
        [{"context": [user("A?")], "response1": "B.", "response2": "C.", "overall_preference": 0}],
        tied([user("A?")], "B.", "C.", {"ranks": [0, 0]}),
    ),
    (
        "helpsteer3-edit-quality",
        [{"context": [user("A?")], "good_edited_response": "B.", "bad_edited_response": "C.", "feedback": ["f"]}],
        both([user("A?")], "B.", "C."),
    ),
    (
        "pku-saferlhf",
        [
            {
                "prompt": "A bird?",
                "response_0": "Elk.",
                "response_1": "Owl.",
                "is_response_0_safe": True,
                "is_response_1_safe": False,
                "better_response_id": 1,
                "safer_response_id": 0,
            }
        ],
        {
            **both("A bird?", "Owl.", "Elk."),
            "ranked": [{"prompt": "A bird?", "completions": ["Elk.", "Owl."], "ranks": [1, 0]}],
        },
    ),
    (
        "orca-dpo-pairs",
        [{"system": "Be brief.", "question": "A bird?", "chosen": "Owl.", "rejected": "Elk."}],
        {
            **both([system("Be brief."), user("A bird?")], "Owl.", "Elk."),
            "prompts": [
                {"system": "Be brief.", "question": "A bird?", "prompt": [system("Be brief."), user("A bird?")]}
            ],
        },
    ),
    (
        "orca-dpo-pairs",
        [{"system": "", "input": "A bird?", "chosen": "Owl.", "rejected": "Elk.", "rating": [9, 8], "generations": []}],
        both([user("A bird?")], "Owl.", "Elk."),
    ),
    (
        "orca-dpo-pairs",
        [{"instruction": "Name one.", "input": "A bird.", "chosen": "Owl.", "rejected": "Elk."}],
        both("Name one.\n\nA bird.", "Owl.", "Elk."),
    ),
    (
        "chosen-response",
        [
            {
                "source": "s",
                "instruction": "A bird?",
                "chosen_response": "Owl.",
                "rejected_response": "Elk.",
                "chosen_avg_rating": 4.75,
                "rejected_avg_rating": 2.0,
                "chosen_model": "m",
            }
        ],
        both("A bird?", "Owl.", "Elk."),
    ),
    (
        "stack-exchange-paired",
        [{"qid": 1, "question": "A bird?", "date": "d", "metadata": [], "response_j": "Owl.", "response_k": "Elk."}],
        both("A bird?", "Owl.", "Elk."),
    ),
    (
        "ultrainteract-pair",
        [
            {
                "task": "Math",
                "dataset": "d",
                "id": "1",
                "parent_id": "0",
                "trajectory": [
                    {"from": "user", "value": "A bird?"},
                    {"from": "assistant", "value": "Hm."},
                    {"from": "user", "value": "Say."},
                ],
                "chosen": "Owl.",
                "rejected": "Elk.",
            }
        ],
        both([user("A bird?"), assistant("Hm."), user("Say.")], "Owl.", "Elk."),
    ),
    (
        "model-written-evals",
        [{"question": "A bird?", "answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"}],
        {
            "prompts": [
                {
                    "question": "A bird?",
                    "answer_matching_behavior": " (A)",
                    "answer_not_matching_behavior": " (B)",
                    "prompt": "A bird?",
                }
            ]
        },
    ),
    (
        "chatbot-arena",
        [
            {
                "question_id": "q",
                "model_a": "x",
                "model_b": "y",
                "winner": "model_b",
                "judge": "arena_user_1",
                "conversation_a": [user("A bird?"), assistant("Elk.")],
                "conversation_b": [user("A bird?"), assistant("Owl.")],
                "turn": 1,
                "language": "English",
            }
        ],
        {
            **both([user("A bird?")], [assistant("Owl.")], [assistant("Elk.")]),
            "ranked": [
                {
                    "prompt": [user("A bird?")],
                    "completions": [[assistant("Elk.")], [assistant("Owl.")]],
                    "ranks": [1, 0],
                    "labeler": "arena_user_1",
                }
            ],
        },
    ),
    (
        "chatbot-arena",
        [
            {
                "winner": "both_bad",
                "conversation_a": [
                    user([{"type": "text", "text": "A bird?", "image": None}]),
                    assistant([{"type": "text", "text": "Elk."}]),
                    user("More?"),
                    assistant("Eel."),
                ],
                "conversation_b": [
                    user([{"type": "text", "text": "A bird?"}]),
                    assistant("Mud."),
                    user("More?"),
                    assistant("Ice."),
                ],
            }
        ],
        tied(
            [user("A bird?")],
            [assistant("Elk."), user("More?"), assistant("Eel.")],
            [assistant("Mud."), user("More?"), assistant("Ice.")],
            {"ranks": [0, 0]},
        ),
    ),
    (
        "arena-human-preference-55k",
        [
            {
                "id": 1,
                "model_a": "x",
                "model_b": "y",
                "prompt": '["A bird?"]',
                "response_a": '["Owl."]',
                "response_b": '["Elk."]',
                "winner_model_a": 1,
                "winner_model_b": 0,
                "winner_tie": 0,
            }
        ],
        both([user("A bird?")], [assistant("Owl.")], [assistant("Elk.")]),
    ),
    (
        "arena-human-preference-55k",
        [
            {
                "prompt": '["A bird?", "More?"]',
                "response_a": '["Owl.", "Jay."]',
                "response_b": '["Elk.", "Eel."]',
                "winner_model_a": 0,
                "winner_model_b": 0,
                "winner_tie": 1,
            }
        ],
        tied(
            [user("A bird?")],
            [assistant("Owl."), user("More?"), assistant("Jay.")],
            [assistant("Elk."), user("More?"), assistant("Eel.")],
            {"ranks": [0, 0]},
        ),
    ),
    ("oasst-trees", [{"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": TREE}], TREE_ROWS),
    ("oasst", table(TREE), TREE_ROWS),
    (
        "question-answer",
        [{"question": "500 and 600?", "answer": "Add: <<500+600=1100>>1,100.\n#### 1,100"}],
        {
            "sft": [{"prompt": "500 and 600?", "completion": "Add: <<500+600=1100>>1,100.\n#### 1,100"}],
            "prompts": [{"question": "500 and 600?", "prompt": "500 and 600?", "answer": "1100"}],
        },
    ),
    (
        "question-answer",
        [{"question": "A bird?", "answer": "1,000 owls."}],
        {"prompts": [{"question": "A bird?", "prompt": "A bird?", "answer": "1,000 owls."}]},
    ),
    (
        "math",
        [
            {
                "problem": "Half?",
                "level": "Level 1",
                "type": "Algebra",
                "solution": "\\boxed{x} is \\boxed{\\frac{1}{2}}.",
            }
        ],
        {
            "sft": [{"prompt": "Half?", "completion": "\\boxed{x} is \\boxed{\\frac{1}{2}}."}],
            "prompts": [
                {
                    "problem": "Half?",
                    "level": "Level 1",
                    "type": "Algebra",
                    "prompt": "Half?",
                    "solution": "\\boxed{x} is \\boxed{\\frac{1}{2}}.",
                    "answer": "\\frac{1}{2}",
                }
            ],
        },
    ),
    (
        "math",
        [{"problem": "Half?", "solution": "It is \\boxed{1}.", "answer": "0.5", "unique_id": "u"}],
        {
            "prompts": [
                {
                    "problem": "Half?",
                    "solution": "It is \\boxed{1}.",
                    "unique_id": "u",
                    "prompt": "Half?",
                    "answer": "0.5",
                }
            ]
        },
    ),
    (
        "math",
        [{"problem": "Half?", "generated_solution": "So 1/2.", "expected_answer": "1/2", "problem_source": "s"}],
        {"sft": [{"prompt": "Half?", "completion": "So 1/2."}]},
    ),
    (
        "openr1",
        [
            {
                "problem": "Half?",
                "solution": "s",
                "answer": "1/2",
                "uuid": "u",
                "is_reasoning_complete": [True] * 3,
                "generations": ["No.", "1/2.", "Half."],
                "correctness_math_verify": [False, True, True],
            }
        ],
        {
            "ranked": [{"prompt": [user("Half?")], "completions": ["No.", "1/2.", "Half."], "scores": [0, 1, 1]}],
            "preference": [{"prompt": [user("Half?")], "chosen": "1/2.", "rejected": "No."}],
            "sft": [{"prompt": [user("Half?")], "completion": "1/2."}],
            "unpaired": [
                {"prompt": [user("Half?")], "completion": "No.", "label": False},
                {"prompt": [user("Half?")], "completion": "1/2.", "label": True},
                {"prompt": [user("Half?")], "completion": "Half.", "label": True},
            ],
            "prompts": [{"problem": "Half?", "solution": "s", "uuid": "u", "prompt": [user("Half?")], "answer": "1/2"}],
        },
    ),
    (
        "openr1",
        [{"problem": "Half?", "generations": ["No."], "correctness_math_verify": [False]}],
        {"ranked": [], "preference": [], "sft": []},
    ),
    (
        "mbpp",
        [
            {
                "task_id": 1,
                "text": "Double it.",
                "code": "def f(x): return 2 * x",
                "test_list": ["assert f(1) == 2", "assert f(2) == 4"],
                "test_setup_code": "import math",
                "challenge_test_list": [],
            }
        ],
        {"sft": [{"prompt": "Double it.", "completion": "def f(x): return 2 * x"}]},
    ),
    (
        "sharegpt",
        [{"id": "1", "conversations": [{"from": "human", "value": "A bird?"}, {"from": "gpt", "value": "Owl."}]}],
        {
            "sft": [{"messages": [user("A bird?"), assistant("Owl.")]}],
            "prompts": [
                {
                    "id": "1",
                    "conversations": [{"from": "human", "value": "A bird?"}, {"from": "gpt", "value": "Owl."}],
                    "messages": [user("A bird?"), assistant("Owl.")],
                }
            ],
        },
    ),
    (
        "sharegpt",
        [
            {
                "system_prompt": "Be brief.",
                "conversations": [
                    {"from": "gpt", "value": "Lost."},
                    {"from": "human", "value": "A bird?", "weight": None},
                    {"from": "gpt", "value": "Elk.", "weight": 0.0},
                    {"from": "human", "value": "Sure?"},
                    {"from": "gpt", "value": "Owl.", "weight": 1.0},
                    {"from": "human", "value": "Bye."},
                ],
            }
        ],
        {
            "sft": [
                {
                    "messages": [
                        system("Be brief."),
                        user("A bird?"),
                        assistant("Elk.", weight=0.0),
                        user("Sure?"),
                        assistant("Owl.", weight=1.0),
                    ]
                }
            ]
        },
    ),
    (
        "sharegpt",
        [
            {
                "conversations": [
                    {"from": "human", "value": "A bird?"},
                    {"from": "function_call", "value": '{"name": "find", "arguments": {"what": "owl"}}'},
                    {"from": "observation", "value": "owl"},
                    {"from": "gpt", "value": "Owl."},
                ],
                "tools": TOOLS,
            }
        ],
        {
            "sft": [
                {
                    "messages": [
                        user("A bird?"),
                        assistant("", tool_calls=[CALL]),
                        {"role": "tool", "content": "owl"},
                        assistant("Owl."),
                    ],
                    "tools": TOOLS,
                }
            ]
        },
    ),
    (
        "sharegpt",
        [
            {
                "conversations": [
                    {"from": "system", "value": "You call <tools>...</tools>."},
                    {"from": "human", "value": "A bird?"},
                    {"from": "gpt", "value": "Owl."},
                ],
                "tools": TOOLS,
            }
        ],
        {"sft": [{"messages": [system("You call <tools>...</tools>."), user("A bird?"), assistant("Owl.")]}]},
    ),
    (
        "sharegpt",
        [{"conversation": [{**user("A bird?"), "country": "x"}, {**assistant("Owl."), "toxic": False}], "model": "m"}],
        {"sft": [{"messages": [user("A bird?"), assistant("Owl.")]}]},
    ),
    (
        "sharegpt",
        [{"messages": {"role": ["user", "assistant"], "content": ["A bird?", "Owl."]}}],
        {"sft": [{"messages": [user("A bird?"), assistant("Owl.")]}]},
    ),
    (
        "sharegpt-pairs",
        [
            {
                "conversations": [{"from": "human", "value": "A bird?"}],
                "chosen": {"from": "gpt", "value": "Owl."},
                "rejected": {"from": "gpt", "value": "Elk."},
            }
        ],
        both([user("A bird?")], [assistant("Owl.")], [assistant("Elk.")]),
    ),
    (
        "sharegpt-pairs",
        [{"messages": [user("A bird?")], "chosen": assistant("Owl."), "rejected": assistant("Elk.")}],
        both([user("A bird?")], [assistant("Owl.")], [assistant("Elk.")]),
    ),
    (
        "sharegpt",
        [
            {
                "system": "",
                "mask": "User",
                "conversations": [
                    {"from": "User", "value": "A?", "label": None, "loss": None},
                    {"from": "Assistant", "value": "B.", "label": "x", "loss": False},
                    {"from": "User", "value": "C?", "label": None, "loss": None},
                    {"from": "Assistant", "value": "D.", "label": "x", "loss": True},
                ],
            }
        ],
        {"sft": [{"messages": [user("A?"), assistant("B.", weight=0), user("C?"), assistant("D.")]}]},
    ),
    (
        "alternating",
        [{"id": "1", "data": ["A bird?", "Owl.", "Sure?", "Yes."]}],
        {"sft": [{"messages": [user("A bird?"), assistant("Owl."), user("Sure?"), assistant("Yes.")]}]},
    ),
    (
        "alternating",
        [{"conversations": ["A bird?", "Owl."], "source": "s"}],
        {"sft": [{"messages": [user("A bird?"), assistant("Owl.")]}]},
    ),
    (
        "exchanges",
        [{"source": "s", "conversation": [{"input": "A?", "output": "B."}, {"input": "C?", "output": "D."}]}],
        {"sft": [{"messages": [user("A?"), assistant("B."), user("C?"), assistant("D.")]}]},
    ),
    (
        "alpaca",
        [{"instruction": "Name one.", "input": "A bird.", "output": "Owl.", "text": "Below is all of it."}],
        {
            "sft": [{"prompt": "Name one.\n\nA bird.", "completion": "Owl."}],
            "prompts": [
                {"instruction": "Name one.", "input": "A bird.", "output": "Owl.", "prompt": "Name one.\n\nA bird."}
            ],
        },
    ),
    ("alpaca", [{"instruction": "A?", "input": "", "output": "B."}], {"sft": [{"prompt": "A?", "completion": "B."}]}),
    ("alpaca", [{"instruction": "A?", "output": "B."}], {"sft": [{"prompt": "A?", "completion": "B."}]}),
    (
        "alpaca",
        [{"system": "Be brief.", "instruction": "C?", "input": "", "output": "D.", "history": [["A?", "B."]]}],
        {"sft": [{"prompt": [system("Be brief."), user("A?"), assistant("B."), user("C?")], "completion": "D."}]},
    ),
    (
        "dolly",
        [{"instruction": "Which bird?", "context": "Owls fly.", "response": "Owls.", "category": "closed_qa"}],
        {
            "sft": [{"prompt": "Which bird?\n\nOwls fly.", "completion": "Owls."}],
            "prompts": [
                {
                    "instruction": "Which bird?",
                    "context": "Owls fly.",
                    "response": "Owls.",
                    "category": "closed_qa",
                    "prompt": "Which bird?\n\nOwls fly.",
                }
            ],
        },
    ),
    (
        "dolly",
        [{"instruction": "A?", "context": "", "response": "B.", "category": "open_qa"}],
        {"sft": [{"prompt": "A?", "completion": "B."}]},
    ),
    (
        "openorca",
        [{"id": "1", "system_prompt": "Be brief.", "question": "A?", "response": "B."}],
        {"sft": [{"prompt": [system("Be brief."), user("A?")], "completion": "B."}]},
    ),
    (
        "openorca",
        [{"id": "1", "system_prompt": "", "question": "A?", "response": "B."}],
        {"sft": [{"prompt": [user("A?")], "completion": "B."}]},
    ),
    (
        "openorca",
        [{"system": "Be brief.", "prompt": "A?", "response": "B.", "id": "1"}],
        {
            "sft": [{"prompt": [system("Be brief."), user("A?")], "completion": "B."}],
            "prompts": [
                {"system": "Be brief.", "response": "B.", "id": "1", "prompt": [system("Be brief."), user("A?")]}
            ],
        },
    ),
    ("content", [{"content": "All owls.", "url": "u"}], {"text": [{"text": "All owls."}]}),
    ("content", [{"raw_content": "All owls."}], {"text": [{"text": "All owls."}]}),
    (
        "question-response",
        [{"kind": "k", "input": "A?", "target": "B."}],
        {"sft": [{"prompt": "A?", "completion": "B."}]},
    ),
    (
        "question-response",
        [{"role_1": "r", "topic": "t", "message_1": "A?", "message_2": "B."}],
        {"sft": [{"prompt": "A?", "completion": "B."}]},
    ),
    (
        "beavertails",
        [{"prompt": "A?", "response": "B.", "category": {"theft": False}, "is_safe": True}],
        {"unpaired": [{"prompt": "A?", "completion": "B.", "label": True}]},
    ),
    (
        "question-response",
        [{"type": "t", "query": "A?", "original_question": "a", "response": "B."}],
        {"sft": [{"prompt": "A?", "completion": "B."}]},
    ),
    (
        "question-response",
        [{"inputs": "A?", "targets": "B.", "language": "English"}],
        {"sft": [{"prompt": "A?", "completion": "B."}]},
    ),
    (
        "alpaca",
        [{"system_prompt": "Be brief.", "instruction": "C?", "input": "", "output": "D."}],
        {"sft": [{"prompt": [system("Be brief."), user("C?")], "completion": "D."}]},
    ),
    (
        "llama-nemotron",
        [{"input": [user("A?")], "output": "B.", "category": "chat", "reasoning": "off", "system_prompt": "Think."}],
        {"sft": [{"prompt": [system("Think."), user("A?")], "completion": "B."}]},
    ),
    (
        "math",
        [{"question": "Half?", "solution": "So, 1/2.", "answer": "1/2"}],
        {
            "sft": [{"prompt": "Half?", "completion": "So, 1/2."}],
            "prompts": [{"question": "Half?", "solution": "So, 1/2.", "prompt": "Half?", "answer": "1/2"}],
        },
    ),
    (
        "math",
        [{"problem": "Half of 8?", "answer": 4, "system": "Be brief."}],
        {
            "prompts": [
                {
                    "problem": "Half of 8?",
                    "system": "Be brief.",
                    "prompt": [system("Be brief."), user("Half of 8?")],
                    "answer": "4",
                }
            ]
        },
    ),
    (
        "question-answer",
        [{"question": "Half of 8?", "answer": 4.0}],
        {"prompts": [{"question": "Half of 8?", "prompt": "Half of 8?", "answer": "4.0"}]},
    ),
    (
        "exchanges",
        [{"conversation": [{"system": "Be brief.", "input": "A?", "output": "B."}, {"input": "C?", "output": "D."}]}],
        {"sft": [{"messages": [system("Be brief."), user("A?"), assistant("B."), user("C?"), assistant("D.")]}]},
    ),
    (
        "alternating",
        [{"system": "Be brief.", "data": ["A?", "B."]}],
        {"sft": [{"messages": [system("Be brief."), user("A?"), assistant("B.")]}]},
    ),
    (
        "sharegpt-pairs",
        [
            {
                "tools": ['{"name": "find"}'],
                "messages": [user("A bird?")],
                "chosen_response": assistant("Owl."),
                "rejected_response": assistant("Elk."),
            }
        ],
        {
            "preference": [
                {
                    "prompt": [user("A bird?")],
                    "chosen": [assistant("Owl.")],
                    "rejected": [assistant("Elk.")],
                    "tools": ['{"name": "find"}'],
                }
            ]
        },
    ),
    (
        "xlam",
        [
            {
                "id": 0,
                "query": "A bird?",
                "tools": '[{"name": "find", "parameters": {}}]',
                "answers": '[{"name": "find", "arguments": {"what": "owl"}}]',
            }
        ],
        {
            "sft": [
                {
                    "prompt": [user("A bird?")],
                    "completion": [assistant("", tool_calls=[CALL])],
                    "tools": [{"type": "function", "function": {"name": "find", "parameters": {}}}],
                }
            ]
        },
    ),
    (
        "openai-preference",
        [
            {
                "input": {"messages": [user("A bird?")], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [assistant("Owl.")],
                "non_preferred_output": [assistant("Elk.")],
            }
        ],
        both([user("A bird?")], [assistant("Owl.")], [assistant("Elk.")]),
    ),
]

CHAT = [user("A bird?"), assistant("Owl.")]
OTHER_CHAT = [user("A bird?"), assistant("Elk.")]
BINARIZED = {
    "prompt": "A bird?", "prompt_id": "x", "chosen": CHAT, "rejected": OTHER_CHAT, "messages": CHAT,
    "score_chosen": 8.0, "score_rejected": 3.0,
}  # fmt: skip
SCORED = {
    "prompt_id": "x", "prompt": "A bird?", "all_generated_responses": ["Elk.", "Owl.", "Jay."],
    "all_rm_scores": [0.1, 0.3, 0.2], "chosen": CHAT, "rejected": OTHER_CHAT,
}  # fmt: skip
VERL = {
    "data_source": "d", "prompt": [user("Half?")], "ability": "math", "extra_info": {"index": 1},
    "reward_model": {"style": "rule", "ground_truth": "1/2"},
}  # fmt: skip
RLVR = {"messages": [user("Half?")], "ground_truth": "1/2", "dataset": "MATH"}
NUMINA = {
    "source": "s",
    "problem": "Half?",
    "solution": "So \\boxed{1/2}.",
    "messages": [user("Half?"), assistant("So")],
}

# layouts that hold our own fields too: (format or None, raw rows, {kind: rows})
ALSO_OURS = [
    (None, [BINARIZED], {kind: [BINARIZED] for kind in ("ranked", "preference", "unpaired", "sft")}),
    (
        "pairs",
        [BINARIZED],
        {
            "prompts": [
                {"prompt_id": "x", "score_chosen": 8.0, "score_rejected": 3.0, "prompt": [user("A bird?")]},
            ]
        },
    ),
    (
        "pairs",
        [{"chosen": CHAT, "rejected": OTHER_CHAT, "source": "s", "chosen_rating": 5.0}],
        {
            "sft": [{"prompt": [user("A bird?")], "completion": [assistant("Owl.")]}],
            "prompts": [{"source": "s", "chosen_rating": 5.0, "prompt": [user("A bird?")]}],
        },
    ),
    (
        "pairs",
        [{"prompt": "A bird?", "chosen": "Owl.", "rejected": "Elk."}],
        {"sft": [{"prompt": "A bird?", "completion": "Owl."}]},
    ),
    (
        "scored-generations",
        [SCORED],
        {
            "ranked": [
                {"prompt": [user("A bird?")], "completions": ["Elk.", "Owl.", "Jay."], "scores": [0.1, 0.3, 0.2]}
            ]
        },
    ),
    (None, [SCORED], {"preference": [SCORED]}),
    (
        "messages",
        [{"prompt": "A bird? ", "prompt_id": "x", "messages": CHAT, "category": "c"}],
        {"prompts": [{"prompt_id": "x", "category": "c", "messages": CHAT}]},
    ),
    (None, [{"prompt": "A?", "messages": CHAT}], {"sft": [{"prompt": "A?", "messages": CHAT}]}),
    ("verl", [VERL], {"prompts": [{**VERL, "answer": "1/2"}]}),
    ("rlvr", [RLVR], {"prompts": [{**RLVR, "answer": "1/2"}]}),
    ("rlvr", [{**RLVR, "ground_truth": ["1/2"]}], {"prompts": [{**RLVR, "ground_truth": ["1/2"], "answer": "1/2"}]}),
    ("rlvr", [{**RLVR, "ground_truth": ["1", "2"]}], {"prompts": [{**RLVR, "ground_truth": ["1", "2"]}]}),
    (
        "verl",
        [{**VERL, "reward_model": {"ground_truth": '["1/2"]'}}],
        {"prompts": [{**VERL, "reward_model": {"ground_truth": '["1/2"]'}, "answer": "1/2"}]},
    ),
    (
        "judged",
        [{"prompt": "A?", "completion": "B.", "label": True}, {"prompt": "A?", "completion": "C.", "label": False}],
        {"sft": [{"prompt": "A?", "completion": "B.", "label": True}]},
    ),
    (
        "judged",
        [{"messages": CHAT, "label": "0"}, {"messages": CHAT, "label": "1"}],
        {"sft": [{"messages": CHAT, "label": "1"}]},
    ),
    (
        "step-dpo",
        [{"prompt": "A?", "initial_reason_steps": "1. Fly. ", "chosen": "2. Owl.", "rejected": "2. Elk."}],
        both([user("A?"), assistant("1. Fly. ")], "2. Owl.", "2. Elk."),
    ),
    (
        "alpaca",
        [{"instruction": "A?", "input": "", "output": "B.", "prompt": "Do this. ### A? ### Answer: B.\n"}],
        {"prompts": [{"instruction": "A?", "input": "", "output": "B.", "prompt": "A?"}]},
    ),
    (None, [NUMINA], {"sft": [NUMINA]}),
    (
        "math",
        [NUMINA],
        {
            "prompts": [
                {
                    "source": "s",
                    "problem": "Half?",
                    "solution": "So \\boxed{1/2}.",
                    "prompt": [user("Half?")],
                    "answer": "1/2",
                }
            ]
        },
    ),
    (
        "mbpp",
        [{"task_id": 2, "prompt": "Double.", "code": "c", "test_imports": ["import math"], "test_list": ["assert 1"]}],
        {
            "prompts": [
                {
                    "task_id": 2, "code": "c", "test_imports": ["import math"], "test_list": ["assert 1"],
                    "prompt": "Double.", "test": "import math\nassert 1",
                }
            ]
        },
    ),
    (
        "arena-human-preference-55k",
        [
            {
                "id": 1, "prompt": '["A?", "C?"]', "response_a": '["B.", "D."]', "response_b": '["E.", "F."]',
                "winner_model_a": 1, "winner_model_b": 0,
            }
        ],
        {
            "prompts": [
                {
                    "id": 1, "response_a": '["B.", "D."]', "response_b": '["E.", "F."]', "winner_model_a": 1,
                    "winner_model_b": 0, "prompt": [user("A?")],
                }
            ]
        },
    ),
    (
        "orca-dpo-pairs",
        [{"id": "1", "system": "Be brief.", "prompt": "A?", "chosen": "B.", "rejected": "C."}],
        {
            **both([system("Be brief."), user("A?")], "B.", "C."),
            "prompts": [{"id": "1", "system": "Be brief.", "prompt": [system("Be brief."), user("A?")]}],
        },
    ),
    (
        "openorca",
        [{"system": "Be brief.", "prompt": "A?", "completion": "B."}],
        {"sft": [{"prompt": [system("Be brief."), user("A?")], "completion": "B."}]},
    ),
    (
        "humaneval",
        [
            {
                "task_id": "T/0", "prompt": "def f(x):\n", "canonical_solution": "    return x\n",
                "test": "def check(candidate):\n    assert candidate(1) == 1", "entry_point": "f",
            }
        ],
        {
            "sft": [{"prompt": "def f(x):\n", "completion": "    return x\n"}],
            "prompts": [
                {
                    "task_id": "T/0", "prompt": "def f(x):\n", "canonical_solution": "    return x\n",
                    "entry_point": "f", "test": "def check(candidate):\n    assert candidate(1) == 1\n\ncheck(f)",
                }
            ],
        },
    ),
    (
        "rankings",
        [{"prompt": "A bird?", "completions": ["Elk.", "Owl.", "Mud."], "ranks": [1, 0, 2], "labeler": "ann"}],
        {
            "preference": [{"prompt": "A bird?", "chosen": "Owl.", "rejected": "Mud."}],
            "sft": [{"prompt": "A bird?", "completion": "Owl."}],
            "unpaired": [
                {"prompt": "A bird?", "completion": "Owl.", "label": True},
                {"prompt": "A bird?", "completion": "Mud.", "label": False},
            ],
        },
    ),
]  # fmt: skip
