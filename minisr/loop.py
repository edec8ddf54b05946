"""The loop: M0 -> SFT baseline and M1 -> M2 -> M3 -> ...

`self_reward` is figure 1 of the paper. What an arrow makes is kept in a file (stages.py), so that
a run that was stopped goes on at its first unfinished arrow.
"""

from minisr.runner.files import read_json, write_json
from minisr.runner.metrics import model_metrics
from minisr.runner.run import Run
from minisr.runner.stages import Model


def self_reward(M_t: Model) -> Model:
    """One turn of figure 1: the model makes its own training data, and is trained on it."""
    x = M_t.new_prompts()  # {x_i}
    y = M_t.respond(x)  # {y_i^1 .. y_i^N}
    r = M_t.judge(x, y)  # {r_i^1 .. r_i^N}
    pairs = M_t.select_pairs(x, y, r)  # {x_i, y_i^w, y_i^l}
    return M_t.train_dpo(pairs)  # M_{t+1}


def run_loop(run: Run, after=lambda metrics: None) -> dict:
    """M0 to M_{T+1} and every model's evaluation; `after` is shown the metrics as they grow.

    Returns what metrics.json holds: {"models": {"SFT": {...}, "M1": {...}, ...}}."""
    M0 = Model(run, "M0").copy_seed_model()
    models = [M0.train_sft("SFT", run.ift())]
    after(evaluate(run, models))
    models.append(M0.train_sft("M1", run.ift() + run.eft(baseline=models[0])))
    after(evaluate(run, models))
    for _ in range(run.config.iterations):
        models.append(self_reward(models[-1]))
        after(evaluate(run, models))
    return read_json(run.folder / "metrics.json", "metrics")


def finished_models(run: Run) -> list[Model]:
    """SFT, M1, M2, ... as far as the run has come."""
    names = ["SFT", *(f"M{t}" for t in range(1, run.config.iterations + 2))]
    return [Model(run, name) for name in names if (run.folder / name / "meta.json").exists()]


def evaluate(run: Run, models: list[Model]) -> dict:
    """Write and return metrics.json: each model by itself, against the one before, against SFT."""
    answers = {model.name: model.answer(run.evaluation()) for model in models}
    metrics = {"seed": run.config.seed, "models": {
        model.name: model_metrics(model, answers, run.judge_evaluation()) for model in models}}
    write_json(run.folder / "metrics.json", metrics)
    return metrics
