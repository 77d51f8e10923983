"""An archive in memory, of a sheet that keeps everything: what it holds is known exactly."""

from __future__ import annotations

from dataclasses import replace

from cribsheet import CompressedKnowledgeLLM
from cribsheet.attention.prefix import turned_back
from cribsheet.living.segments import sheet_layers


class Shelf:
    def __init__(self, whole: CompressedKnowledgeLLM):
        sheet, backbone = whole.sheet, whole.backbone
        layers = sheet_layers(backbone, sheet)
        self.tokens = sheet.length
        self.origins = sheet.origins
        self.layers = []
        for number, layer in enumerate(layers):
            back = turned_back(layer, sheet.length, backbone.inv_freqs[number])
            self.layers.append((back.keys, back.values))

    def stretch(self, first, stop):
        return [(k[:, first:stop], v[:, first:stop]) for k, v in self.layers]

    def places(self, document, first_char, last_char):
        index, number, start, stop = self.origins.long().unbind(1)
        inside = index[(number == document) & (start < last_char) & (stop > first_char)]
        return (int(inside.min()), int(inside.max()) + 1) if len(inside) else (0, 0)


def with_shelf(kb, whole):
    return CompressedKnowledgeLLM(kb.backbone, replace(kb.sheet, archive=Shelf(whole)))
