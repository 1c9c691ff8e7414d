"""The functions that lmms-eval's task YAML names; it loads them from a copy beside the YAML."""


def pictures(row):
    return [row["image"].convert("RGB")]


def question(row, lmms_eval_specific_kwargs=None):
    return row["question"]
