"""Simulators that speak the production protocols with real keys and real TLS."""
