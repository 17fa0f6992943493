"""Stands in for the package reasoning-gym: the part of its interface that this project uses, with three tasks."""
