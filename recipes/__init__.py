"""YAML recipes users start from; `flowmill train digits` finds `digits.yaml` here."""
