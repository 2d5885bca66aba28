"""One invented record of every format, with the fields of its source."""

RECORDS = {
    "gsm8k": {
        "question": "Mira has 7 pens and buys 2 boxes of 6. How many has she?",
        "answer": "She buys 2*6=<<2*6=12>>12 pens.\nSo she has $<<7+12=19>>19 in all.\nThat is it.\n#### 19",
    },
    "gsm8k-socratic": {
        "question": "Mira has 7 pens and buys 2 boxes of 6. How many has she?",
        "answer": "How many does she buy? ** She buys <<2*6=12>>12.\nHow many in all? ** 7 + 12 = <<7+12=19>>19\n#### 19",
    },
    "svamp": {
        "ID": "made-1", "Body": "Tom had 9 figs. He ate 4", "Question": "How many are left?", "Equation": "( 9.0 - 4.0 )",
        "Answer": 5.0, "Type": "Subtraction",
    },
    "math": {
        "problem": "What is half of $\\frac{2}{3}$?", "level": "Level 1", "type": "Prealgebra",
        "solution": "Half of it is\n$\\boxed{\\frac{1}{3}}$.",
    },
    "math-qa": {"question": "Square 4.", "answer": "It is $4^2 = \\boxed{16}$.The answer is: 16"},
    "processbench": {
        "id": "omnimath-3", "generator": "nobody", "problem": "Add 2 and 2, then 3.", "final_answer_correct": False, "label": 1,
        "steps": ["First, 2 + 2 = 4.", "Then 4 + 3 = 8.", "So it is \\(\\boxed{8}\\)."],
    },
    "bbh": {"_task": "navigate", "input": "Turn left. Are you back?\nOptions:\n- Yes\n- No", "target": "Yes"},
    "arc": {
        "id": "made_1", "answerKey": "B",
        "question": {"stem": "What melts ice?", "choices": [{"text": "cold", "label": "A"}, {"text": "heat", "label": "B"}]},
    },
    "prontoqa": {
        "id": "made_1", "context": "Each wug is a dax. Every dax is not loud. Ann is a wug.", "answer": "B",
        "question": "Is the following statement true or false? Ann is loud.", "options": ["A) True", "B) False"],
        "explanation": ["Ann is a wug.", "Each wug is a dax.", "Ann is a dax.", "Every dax is not loud.", "Ann is not loud."],
    },
    "entailmentbank": {
        "id": "made_1", "context": "sent1: ice is water sent2: water can flow sent3: what flows can move",
        "answer": "It moves.",
        "question": "What does ice do?", "hypothesis": "ice can move", "meta": {"x": 1}, "depth_of_proof": 2,
        "proof": "sent1 & sent2 -> int1: ice can flow; int1 & sent3 -> hypothesis; ",
    },
    "folio": {
        "premises": ["All cats purr.", "Tom is a cat. "], "premises-FOL": ["...", "..."], "conclusion": "Tom purrs.",
        "label": "True",
    },
    "cladder": {
        "question_id": 1, "desc_id": "made", "given_info": "P is 40%.", "question": "Does X raise Y?", "answer": "no",
        "meta": {"query_type": "ate", "rung": 2}, "background": "X causes Y.",
        "reasoning": {
            "step0": "X = rain.", "step1": "X->Y", "step2": "E[Y|do(X=1)]", "step4": "P(Y)=0.4\nP(X)=0.1", "end": "-1 < 0",
        },
    },
    "reasoning-gym": {"question": "1+1?", "answer": "2", "metadata": {"source_dataset": "chain_sum", "source_index": 0}},
    "inspect": {
        "id": 7, "epoch": 1, "input": "What is 3+4?", "target": "7", "scores": {"match": {"value": "C", "answer": "7"}},
        "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3+4?"},
            {"role": "assistant", "content": "3+4=7\nANSWER: 7"},
        ],
        "output": {"model": "m", "choices": [{"message": {"role": "assistant", "content": "3+4=7\nANSWER: 7"}}]},
    },
    "lm-eval": {
        "doc_id": 4, "doc": {"q": "3+4"}, "target": "so\n#### 7",
        "arguments": {"gen_args_0": {"arg_0": "Q: 3+4\nA:", "arg_1": {"until": ["\n"]}}},
        "resps": [[" 3+4=8. The answer is 8"]], "filtered_resps": ["8"], "filter": "strict", "exact_match": 0.0,
    },
    "text": {"text": "A title\nA body.\n"},
}  # fmt: skip
