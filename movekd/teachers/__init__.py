"""Frozen encoders behind one protocol: a spec goes in, a ``Teacher`` comes out."""

from movekd.teachers.load import Teacher, TeacherOutput, load_teacher

__all__ = ["Teacher", "TeacherOutput", "load_teacher"]
