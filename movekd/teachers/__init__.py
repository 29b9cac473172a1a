"""Frozen encoders behind one protocol: load the ``Teacher`` that a spec describes."""

from movekd.teachers.backbone import Backbone, TeacherOutput
from movekd.teachers.providers import register_provider
from movekd.teachers.teacher import Teacher, load_teacher

__all__ = ["Backbone", "Teacher", "TeacherOutput", "load_teacher", "register_provider"]
