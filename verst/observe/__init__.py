"""Metrics, timed spans and the sinks that keep them. Imports nothing heavy; sinks load their libraries when opened."""
