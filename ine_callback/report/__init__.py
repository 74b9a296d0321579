"""What users hold: the report, its tables, its disk format, its plots and its HTML. Knows scores only."""

from ine_callback.applications.group import GroupScore
from ine_callback.applications.layer_plan import Allocation, LayerPlan
from ine_callback.applications.layer_sensitivity import LayerSensitivity
from ine_callback.report.compare import Agreement, Comparison
from ine_callback.report.example import example_report
from ine_callback.report.reading import ReportError
from ine_callback.report.report import InfluenceReport
from ine_callback.report.runinfo import RunInfo
from ine_callback.report.samples import rendered
from ine_callback.report.shown import Image, Text, Values
from ine_callback.report.table import RowScore, ScoreTable

__all__ = [
    "Agreement",
    "Allocation",
    "Comparison",
    "GroupScore",
    "Image",
    "InfluenceReport",
    "LayerPlan",
    "LayerSensitivity",
    "ReportError",
    "RowScore",
    "RunInfo",
    "ScoreTable",
    "Text",
    "Values",
    "example_report",
    "rendered",
]
