"""How arguments that ``Trainer`` had in BigDL 2.x and older Lightning are answered: they work,
or the error says what to write now.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigdl._base.calls import Gone, Renamed

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["COMPILE", "TRAINER"]

_TRIED = Gone(
    "acceleration='auto' tries it by itself and keeps what is faster; Plan.of(…) pins a choice.",
    harmless=(None, False),
)
_SEARCH = Gone("this version has no search for hyperparameters.", harmless=(None, False))

COMPILE: Mapping[str, Renamed | Gone] = {
    "onnx": Gone("trace or quantize the trained model.", harmless=(None, False)),
    "input_sample": Gone("give it to trace or quantize.", harmless=(None,)),
}

TRAINER: Mapping[str, Renamed | Gone] = {
    "use_ipex": Gone("IPEX has ended; acceleration='auto' tries bf16 and channels_last.",
                     harmless=(None, False)),
    "enable_bf16": _TRIED,
    "channels_last": _TRIED,
    "use_hpo": _SEARCH,
    "algorithms": Gone("pass callbacks=[…]."),
    "auto_lr_find": Gone("use Lightning's LearningRateFinder, or Tuner(trainer).lr_find(model).",
                         harmless=(None, False)),
    "auto_scale_batch_size": Gone("use Lightning's BatchSizeFinder, or its Tuner.",
                                  harmless=(None, False)),
    "checkpoint_callback": Renamed("enable_checkpointing"),
    "flush_logs_every_n_steps": Gone("set it on the logger."),
    "gpus": Gone("use accelerator='gpu', devices=….", harmless=(None, 0)),
    "tpu_cores": Gone("use accelerator='tpu', devices=…."),
    "ipus": Gone("use accelerator= and devices=."),
    "progress_bar_refresh_rate": Gone("pass callbacks=[TQDMProgressBar(refresh_rate=…)]."),
    "process_position": Gone("pass callbacks=[TQDMProgressBar(process_position=…)].",
                             harmless=(None, 0)),
    "replace_sampler_ddp": Renamed("use_distributed_sampler"),
    "resume_from_checkpoint": Gone("it is an argument of fit now: fit(…, ckpt_path=…)."),
    "stochastic_weight_avg": Gone("pass callbacks=[StochasticWeightAveraging(…)].",
                                  harmless=(None, False)),
    "terminate_on_nan": Renamed("detect_anomaly"),
    "track_grad_norm": Gone("log it in on_before_optimizer_step.", harmless=(None, -1)),
    "truncated_bptt_steps": Gone("use manual optimization."),
    "weights_save_path": Gone("pass callbacks=[ModelCheckpoint(dirpath=…)].", harmless=(None,)),
    "weights_summary": Gone("use enable_model_summary=, or callbacks=[ModelSummary(…)]."),
    "multiple_trainloader_mode": Gone("pass fit a CombinedLoader(loaders, mode)."),
    "amp_backend": Gone("use precision=.", harmless=(None, "native")),
    "move_metrics_to_cpu": Gone("compute_on_cpu= is an argument of each metric.",
                                harmless=(None, False)),
}  # fmt: skip
