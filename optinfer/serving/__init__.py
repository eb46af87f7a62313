"""Lesson 6: a small serving engine where quantization, attention, the KV cache and speculation meet."""

from optinfer.serving.engine import Engine
from optinfer.serving.model_runner import ModelRunner
from optinfer.serving.output import UnknownRequest
from optinfer.serving.records import ChunkRecord, EngineStats, StepRecord
from optinfer.serving.request import Completion, Delta, Request, RequestMetrics, SamplingParams, Sequence
from optinfer.serving.scheduler import Schedule, ScheduledChunk, Scheduler

__all__ = [
    "ChunkRecord",
    "Completion",
    "Delta",
    "Engine",
    "EngineStats",
    "ModelRunner",
    "Request",
    "RequestMetrics",
    "SamplingParams",
    "Schedule",
    "ScheduledChunk",
    "Scheduler",
    "Sequence",
    "StepRecord",
    "UnknownRequest",
]
