"""Painted facades: a photo-like picture and its label map in the classes of the CMP facade base."""

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter

SIZE = 256  # of each half, in pixels

# The classes of the CMP facade base (Tylecek and Sara 2013) in the colours of the facades data set.
PALETTE = {
    "background": (0, 0, 222),
    "facade": (0, 48, 255),
    "window": (0, 128, 255),
    "door": (0, 207, 255),
    "cornice": (32, 255, 224),
    "sill": (112, 255, 143),
    "balcony": (192, 255, 63),
    "blind": (255, 240, 0),
    "deco": (255, 159, 0),
    "molding": (255, 80, 0),
    "pillar": (255, 0, 0),
    "shop": (174, 0, 0),
}
PIGMENTS = {
    "wall": "#d9c9a3 #c9a66b #e0d8cc #b5654a #a34f3c #c7b8b0 #d8a38c #9aa48c #b9bfc4 #e3c98f",
    "trim": "#efe9dc #d8d0c0 #cbb99a #f3f0ea",
    "roof": "#6b3f35 #58504d #7c4a3a #4b5158",
    "chimney": "#8a5a48 #777777",
    "frame": "#f4f1ea #e6e0d2 #5a3d2b #3f4a40 #6d2f2a #34404f",
    "shutter": "#4f6b52 #7d4638 #5b7387 #8b7d63 #3e4f46",
    "wood": "#5a3a26 #3c2a22 #2f4238 #6b2b26 #39424d",
    "iron": "#2b2b2d #3a3f3a #574a3c",
    "room": "#1f262c #2b3138 #353b3f #272320",
    "reflection": "#7f95a8 #9fb2c2 #5f7487",
    "curtain": "#b5b1a8 #9b9589 #8b9095",
    "sign": "#8c1f28 #1f4e79 #2f6b3f #d9a21b #3b3b3b #efe7d6 #7a3b69",
    "goods": "#a06a5a #6a7fa0 #8c8c6a #b0a090 #5f5f66",
    "zenith": "#6f9fd8 #8fb4dd #c9d2da #dfe3e6 #a9c0d6",
    "paving": "#a8a39a #b5b0a8 #98928a",
    "tar": "#55565a #4a4a4c #6a6867",
    "car": "#b3202a #e8e8e8 #2b3340 #5c6f86 #c9cdd0 #1d1d1f",
    "bark": "#4a3b2e #5b4a3a",
    "leaf": "#4d6b32 #3f5a34 #6b7f3a #8a7a35",
}


def paint_pair(rng: np.random.Generator) -> Image.Image:
    """One pair, 512x256 RGB: the photo on the left, its label map on the right."""
    scene = Scene(rng)
    scene.paint()
    pair = Image.new("RGB", (2 * SIZE, SIZE))
    pair.paste(scene.develop(), (0, 0))
    pair.paste(scene.labels, (SIZE, 0))
    return pair


class Scene:
    """A facade painted onto three canvases: labels, pigments and light.

    Coordinates are pixels of the picture, right and bottom edges excluded. Pigments and light are kept at
    twice the size and averaged at the end. What stands out of the wall darkens the light below and beside
    itself, away from the sun.
    """

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.labels = Image.new("RGB", (SIZE, SIZE), PALETTE["background"])
        self.pigments = Image.new("RGB", (2 * SIZE, 2 * SIZE))
        self.light = Image.new("L", (2 * SIZE, 2 * SIZE), 255)
        self._label = ImageDraw.Draw(self.labels)
        self._pigment = ImageDraw.Draw(self.pigments)
        self._light = ImageDraw.Draw(self.light)
        self.sun_on_the_right = self.chance(0.5)
        self.shadow = rng.uniform(0.45, 0.8)  # how dark it is
        self.walls, self.trim, self.frame = self.mix("wall"), self.mix("trim"), self.mix("frame", 6)
        self.bars = (1, 1)  # of a window: upright, across

    # ---- chance and strokes --------------------------------------------------------------------

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def between(self, low: float, high: float) -> int:
        return int(self.rng.integers(round(low), round(high), endpoint=True))

    def mix(self, pigment: str, spread: float = 12) -> np.ndarray:
        """One of the pigment's colours, a little lighter or darker and a little off its hue."""
        choices = PIGMENTS[pigment].split()
        pure = ImageColor.getrgb(choices[self.between(0, len(choices) - 1)])
        lighter, *hue = self.rng.standard_normal(4) * spread
        return np.array([c + lighter + h / 2 for c, h in zip(pure, hue, strict=True)])

    def box(self, x0, y0, x1, y1, colour, kind: str | None = None, out: float = 0) -> None:
        """A filled box; ``kind`` puts it into the label map, ``out`` is how far it stands out of the wall."""
        if x1 <= x0 or y1 <= y0:
            return
        a, b, c, d = area = 2 * x0, 2 * y0, max(2 * x0, 2 * x1 - 1), max(2 * y0, 2 * y1 - 1)
        if out:
            left, right = (out, 0) if self.sun_on_the_right else (0, out)
            dim = int(255 * (1 - self.shadow * min(1, out / 3)))
            self._light.rectangle((a - left, b + out, c + right, d + 2 * out), dim)
            self._light.rectangle(area, 255)
        self._pigment.rectangle(area, _ink(colour))
        if kind:
            self._label.rectangle((x0, y0, x1 - 1, y1 - 1), PALETTE[kind])

    def shape(self, points, colour) -> None:
        self._pigment.polygon([(2 * x, 2 * y) for x, y in points], _ink(colour))

    def disc(self, x, y, rx, ry, colour) -> None:
        self._pigment.ellipse((2 * (x - rx), 2 * (y - ry), 2 * (x + rx), 2 * (y + ry)), _ink(colour))

    def stripes(self, x0, y0, x1, y1, step, colour) -> None:
        """Thin lines across a box: tiles, slats, courses of stone."""
        for y in range(y0, y1, step):
            self.box(x0, y, x1, y + 0.5, colour)

    # ---- the picture, from the back to the front -----------------------------------------------

    def paint(self) -> None:
        self.sky()
        left, right = (self.between(10, 40) if self.chance(0.5) else 0 for _ in range(2))
        street = self.between(238, 250)
        for x0, x1 in ((0, left), (SIZE - right, SIZE)):
            if x0 < x1:
                self.neighbour(x0, x1, self.between(20, 110), street)
        self.facade(left, SIZE - right, self.between(12, 58), street)
        self.street(street)
        for _ in range(self.between(0, 2)):
            self.car(self.between(-20, 210), street + self.between(2, 6))
        for _ in range(self.between(-2, 2)):
            self.tree(self.between(0, SIZE), street)
        if self.chance(0.3):
            self.wires()
        if self.chance(0.35):
            self.missing_corner()

    def sky(self) -> None:
        zenith = self.mix("zenith")
        horizon = zenith + (250 - zenith) * 0.75
        for y in range(0, SIZE, 2):
            self.box(0, y, SIZE, y + 2, zenith + (horizon - zenith) * min(1, y / 140))
        for _ in range(self.between(0, 5)):
            x, y, width = self.between(-40, 256), self.between(-10, 60), self.between(20, 70)
            for k in range(12):
                r = self.between(2, 7)
                self.disc(x + self.between(0, width), y + self.between(-6, 6), 3 * r, r, horizon - k)

    def neighbour(self, x0, x1, top, bottom) -> None:
        wall = self.mix("wall") * 0.9
        self.shape([(x0, top), ((x0 + x1) / 2, top - 14), (x1, top)], self.mix("roof"))
        self.box(x0, top, x1, bottom, wall)
        for y in range(top + 10, bottom - 30, self.between(28, 38)):
            for x in range(x0 + 5, x1 - 9, 16):
                self.box(x - 1, y - 1, x + 9, y + 17, wall * 1.15)
                self.glass(x, y, x + 8, y + 16)

    def facade(self, x0, x1, top, bottom) -> None:
        self.roof(x0, x1, top)
        self.box(x0, top, x1, bottom, self.walls, "facade")
        cornice, ground = self.between(5, 13), bottom - self.between(44, 60)
        columns = max(2, round((x1 - x0) / self.rng.choice([28, 34, 40, 50, 64, 84])))
        storeys = max(2, round((ground - top - cornice) / self.rng.uniform(38, 64)))
        edges = np.linspace(x0 + 4, x1 - 4, columns + 1).round().astype(int).tolist()
        levels = np.linspace(top + cornice + 2, ground, storeys + 1).round().astype(int).tolist()
        self.choose_windows(edges[1] - edges[0], levels[1] - levels[0])

        pillars = self.chance(0.35)
        if pillars:
            for x in sorted({x0, *edges[1:-1][:: self.between(1, 3)], x1 - 5}):
                self.pillar(x, top + cornice, x + 5, ground)
        banded = self.chance(0.7)
        balconies = self.rng.choice(columns, self.between(0, columns // 2), replace=False).tolist()
        for y0, y1 in zip(levels, levels[1:], strict=False):
            if banded and y0 > levels[0]:
                self.box(x0, y0 - 2, x1, y0 + self.between(0, 1), self.trim, "molding", out=3)
            here = balconies if self.chance(0.55) else []
            for column, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
                self.window((a + b) // 2, (y0 + y1 + 3) // 2, balcony=column in here)
            if self.panels and not here and not pillars:
                for x in edges[1:-1]:
                    self.panel(x, (y0 + y1) // 2)
        self.ground_floor(edges, ground, bottom)
        self.cornice(x0, x1, top, cornice)

    def roof(self, x0, x1, top) -> None:
        height, inset = self.between(0, 30), self.between(0, 24)
        if height < 8:
            return
        tiles, ridge = self.mix("roof"), top - height
        for _ in range(self.between(0, 2)):
            x = self.between(x0 + inset, x1 - inset - 10)
            self.box(x, ridge - self.between(6, 14), x + 7, ridge + 3, self.mix("chimney"))
        self.shape([(x0, top), (x0 + inset, ridge), (x1 - inset, ridge), (x1, top)], tiles)
        for y in range(ridge, top, 3):
            shift = inset * (top - y) / height
            self.box(x0 + shift, y, x1 - shift, y + 0.5, tiles * 0.8)
        if height > 20:
            for x in range(x0 + inset + 12, x1 - inset - 20, self.between(34, 60)):
                self.box(x - 2, top - 19, x + 14, top - 2, self.trim * 0.95, out=3)
                self.shape([(x - 4, top - 18), (x + 6, top - 27), (x + 16, top - 18)], tiles * 0.75)
                self.glass(x, top - 16, x + 12, top - 3, "window")

    def cornice(self, x0, x1, top, height) -> None:
        self.box(x0, top, x1, top + height, self.trim, "molding", out=5)
        self.box(x0, top, x1, top + 2, self.trim * 1.08)
        if height > 7:
            for x in range(x0 + 2, x1 - 2, 5):
                self.box(x, top + height - 4, x + 2.5, top + height - 1, self.trim * 0.72)
        self.box(x0, top + height - 1, x1, top + height, self.trim * 0.8)

    def pillar(self, x0, y0, x1, y1) -> None:
        self.box(x0, y0, x1, y1, self.trim * 0.97, "pillar", out=1.5)
        self.box(x0 + 1.5, y0 + 4, x0 + 2, y1 - 4, self.trim * 0.82)
        self.box(x1 - 2, y0 + 4, x1 - 1.5, y1 - 4, self.trim * 0.82)
        self.box(x0 - 1, y0, x1 + 1, y0 + 4, self.trim * 1.05)

    def panel(self, x, y) -> None:
        self.box(x - 3, y - 7, x + 3, y + 7, self.trim, "deco", out=1)
        self.box(x - 1.5, y - 5, x + 1.5, y + 5, self.trim * 0.8)

    # ---- windows -------------------------------------------------------------------------------

    def choose_windows(self, pitch: int, storey: int) -> None:
        """The kind of window that this house has, for axes ``pitch`` and floors ``storey`` pixels apart."""
        self.width = max(8, int(pitch * self.rng.uniform(0.36, 0.58)) // 2 * 2)
        self.height = max(12, int(storey * self.rng.uniform(0.48, 0.62)))
        self.bars = (self.between(1, max(1, self.width // 8)), self.between(0, 2))
        self.surround, self.sill = self.chance(0.6), self.chance(0.8)
        self.hood, self.gable = self.chance(0.5), self.chance(0.5)
        self.shutters = self.mix("shutter") if self.chance(0.3) else None
        self.panels = self.shutters is None and self.chance(0.2)
        self.lowered_blinds = 0.25 if self.chance(0.4) else 0.0  # share of the windows

    def window(self, cx, cy, balcony: bool) -> None:
        w, h = self.width // 2, self.height // 2
        x0, y0, x1, y1 = cx - w, cy - h, cx + w, cy + h
        if self.surround:
            self.box(x0 - 2, y0 - 2, x1 + 2, y1 + 1, self.trim * 1.04, out=0.5)
        if self.shutters is not None:
            leaf = max(3, w - 2)
            for x in (x0 - leaf - 1, x1 + 1):
                self.box(x, y0, x + leaf, y1, self.shutters, "blind", out=1)
                self.stripes(x + 1, y0 + 2, x + leaf - 1, y1 - 1, 2, self.shutters * 0.7)
        self.glass(x0, y0, x1, y1, "window")
        if self.chance(self.lowered_blinds):
            low = y0 + self.between(3, h * 1.6)
            self.box(x0 + 1, y0, x1 - 1, low, self.frame * 0.95, "blind", out=1)
            self.stripes(x0 + 1, y0 + 1, x1 - 1, low, 2, self.frame * 0.8)
        if self.hood:
            self.box(x0 - 3, y0 - 6, x1 + 3, y0 - 3, self.trim * 1.03, "cornice", out=3)
            if self.gable:
                self.shape([(x0 - 3, y0 - 6), (cx, y0 - 10), (x1 + 3, y0 - 6)], self.trim * 0.96)
        if balcony:
            self.balcony(x0 - 6, y1 - max(7, h // 2), x1 + 6, y1 + 3)
        elif self.sill:
            self.box(x0 - 2, y1 + 1, x1 + 2, y1 + 4, self.trim * 1.05, "sill", out=2)

    def glass(self, x0, y0, x1, y1, kind: str | None = None) -> None:
        """A pane in its frame: a dark room, the sky's reflection, perhaps curtains or a lamp inside."""
        self.box(x0, y0, x1, y1, self.frame, kind)
        room, reflection = self.mix("room", 6), self.mix("reflection") * self.rng.uniform(0.1, 0.75)
        for y in range(y0 + 1, y1 - 1, 3):
            depth = (y - y0) / (y1 - y0)
            self.box(
                x0 + 1,
                y,
                x1 - 1,
                min(y + 3, y1 - 1),
                room * depth + np.maximum(room, reflection) * (1 - depth),
            )
        if self.chance(0.35):
            cloth, part = self.mix("curtain", 20), self.rng.uniform(0.15, 0.42) * (x1 - x0)
            self.box(x0 + 1, y0 + 1, x0 + part, y1 - 1, cloth)
            self.box(x1 - part, y0 + 1, x1 - 1, y1 - 1, cloth)
        elif self.chance(0.06):
            self.box(x0 + 1, y0 + 1, x1 - 1, y1 - 1, (236, 200, 130))
        self.box(x0 + 1, y0 + 1, x1 - 1, y0 + 2.5, room * 0.6)  # the reveal's shadow
        upright, across = self.bars
        for x in np.linspace(x0, x1, upright + 2)[1:-1]:
            self.box(x - 0.5, y0 + 1, x + 0.5, y1 - 1, self.frame)
        for y in np.linspace(y0, y1, across + 3)[1:-2]:
            self.box(x0 + 1, y - 0.5, x1 - 1, y + 0.5, self.frame)

    def balcony(self, x0, y0, x1, y1) -> None:
        self._label.rectangle((x0, y0, x1 - 1, y1 - 1), PALETTE["balcony"])
        solid, iron = self.chance(0.3), self.mix("iron", 4)
        if solid:
            self.box(x0, y0, x1, y1, self.trim * 0.92, out=4)
        for x in range(x0, x1, 6 if solid else 2):
            self.box(x, y0 + 1, x + 0.5, y1 - 3, self.trim * 0.7 if solid else iron)
        self.box(x0, y0, x1, y0 + 1, self.trim if solid else iron)
        self.box(x0, y1 - 3, x1, y1, self.trim * 0.85, out=4)

    # ---- ground floor and street ---------------------------------------------------------------

    def ground_floor(self, edges, top, bottom) -> None:
        base, x0, x1 = self.walls * self.rng.uniform(0.7, 1.05), edges[0] - 4, edges[-1] + 4
        self.box(x0, top + 2, x1, bottom, base)
        if self.chance(0.4):
            self.stripes(x0, top + 8, x1, bottom - 6, 7, base * 0.75)
        self.box(x0, bottom - 6, x1, bottom, base * 0.65)
        self.box(x0, top, x1, top + 4, self.trim, "molding", out=3)
        door, shops = self.between(0, len(edges) - 2), self.chance(0.6)
        for column, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
            half = min(12, (b - a) // 2 - 4)
            left, right = (a + b) // 2 - half, (a + b) // 2 + half
            if column == door:
                self.door(left + 1, top + 12, right - 1, bottom)
            elif shops and b - a > 20:
                self.shop(a + 3, top + 7, b - 3, bottom - 3)
            else:
                self.glass(left, top + 12, right, bottom - 12, "window")
                self.box(left - 2, bottom - 12, right + 2, bottom - 9, self.trim, "sill", out=2)

    def door(self, x0, y0, x1, y1) -> None:
        wood, middle, lock = self.mix("wood"), (x0 + x1) / 2, (y0 + y1) / 2
        self.box(x0 - 2, y0 - 2, x1 + 2, y1, self.trim, out=1)
        self.box(x0, y0, x1, y1, wood, "door")
        self.box(x0 + 1, y0 + 1, x1 - 1, y0 + 7, (150, 165, 175))
        for a, b in ((x0 + 1.5, middle - 1), (middle + 1, x1 - 1.5)):
            for c, d in ((y0 + 9, lock), (lock + 2, y1 - 3)):
                self.box(a, c, b, d, wood * 0.72)
                self.box(a + 0.5, c + 0.5, b, d, wood * 1.12)
        self.box(x0, y0, x1, y0 + 1.5, wood * 0.4)
        self.box(x0 - 3, y1 - 2, x1 + 3, y1, (168, 162, 154))

    def shop(self, x0, y0, x1, y1) -> None:
        self.box(x0, y0, x1, y1, self.frame * 0.7, "shop")
        for y in range(y0 + 8, y1 - 3, 2):
            self.box(x0 + 1, y, x1 - 1, y + 2, np.array((62, 68, 72)) + 40 * (y - y0) / (y1 - y0))
        for _ in range(self.between(4, 12)):
            x, y = self.between(x0 + 2, x1 - 5), self.between(y0 + 14, y1 - 7)
            self.box(x, y, x + self.between(1, 3), y1 - 4, self.mix("goods", 30))
        for x in np.linspace(x0, x1, self.between(3, 4))[1:-1]:
            self.box(x - 0.5, y0 + 8, x + 0.5, y1 - 3, self.frame * 0.8)
        sign = self.mix("sign")
        if self.chance(0.4):  # an awning
            for k, x in enumerate(range(x0, x1, 4)):
                self.box(x, y0 + 7, min(x + 4, x1), y0 + 14, sign if k % 2 else (240, 238, 230), out=4)
        self.box(x0, y0, x1, y0 + 8, sign, out=2)
        x, ink = x0 + self.between(3, 8), (40, 40, 40) if sign.mean() > 140 else (235, 235, 235)
        while x < x1 - 6:  # letters
            self.box(x, y0 + 2.5, x + self.rng.uniform(1, 2.5), y0 + 5.5, ink)
            x += self.rng.uniform(2.2, 4.5)

    def street(self, y) -> None:
        paving = self.mix("paving")
        self.box(0, y, SIZE, y + 5, paving)
        self.box(0, y + 5, SIZE, y + 6, paving * 0.7)
        self.box(0, y + 6, SIZE, SIZE, self.mix("tar"))

    def car(self, x, y) -> None:
        paint, w, h = self.mix("car"), self.between(44, 58), self.between(13, 16)
        self._light.ellipse((2 * x, 2 * y - 4, 2 * (x + w), 2 * y + 5), 90)
        self._pigment.rounded_rectangle((2 * x, 2 * y - 1.24 * h, 2 * (x + w), 2 * y - 4), 8, _ink(paint))
        cabin, panes = (
            ((0.16, 0.6), (0.3, 1), (0.68, 1), (0.86, 0.6)),
            ((0.22, 0.62), (0.33, 0.93), (0.65, 0.93), (0.79, 0.62)),
        )
        self.shape([(x + w * p, y - h * q) for p, q in cabin], paint * 0.9)
        self.shape([(x + w * p, y - h * q) for p, q in panes], (46, 54, 62))
        self.box(x + w * 0.48, y - h * 0.95, x + w * 0.5, y - h * 0.6, paint * 0.9)
        self.box(x + w - 2, y - h * 0.55, x + w, y - h * 0.42, (200, 60, 50))
        for p in (0.2, 0.8):
            self.disc(x + w * p, y - 3, 3.6, 3.6, (26, 26, 26))
            self.disc(x + w * p, y - 3, 1.8, 1.8, (150, 150, 150))

    def tree(self, x, y) -> None:
        height, spread, leaf = self.between(50, 120), self.between(12, 26), self.mix("leaf", 8)
        trunk = [(x - 2, y + 4), (x - 1, y - height), (x + 1, y - height), (x + 2.5, y + 4)]
        self.shape(trunk, self.mix("bark", 4))
        for angle, reach, size, tone in self.rng.random((110, 4)):
            along, up = np.cos(2 * np.pi * angle) * reach**0.5, np.sin(2 * np.pi * angle) * reach**0.5
            r, tone = 1.5 + 3.5 * size, leaf * (1 + 0.3 * up) * (0.6 + 0.6 * tone)
            self.disc(x + spread * along, y - height - 1.3 * spread * up, r, r, tone)

    def wires(self) -> None:
        for _ in range(self.between(1, 3)):
            a, b = self.between(0, 160), self.between(0, 160)
            self._pigment.line((0, 2 * a, SIZE, a + b + 12, 2 * SIZE, 2 * b), (40, 40, 42), 1)

    def missing_corner(self) -> None:
        """What rectification of a photo leaves: a corner without pixels."""
        near, far = self.between(6, 40), self.between(60, 256)
        corner, grey = [(0, 0), (near, 0), (0, far)], 0 if self.chance(0.6) else 128
        if self.chance(0.5):
            corner = [(SIZE - x, y) for x, y in corner]
        if self.chance(0.5):
            corner = [(x, SIZE - y) for x, y in corner]
        self.shape(corner, (grey, grey, grey))

    # ---- the photograph ------------------------------------------------------------------------

    def develop(self) -> Image.Image:
        """Texture, light, lens and grain; returns the photo, 256x256 RGB."""
        red, green, _ = np.asarray(self.labels).transpose(2, 0, 1)
        built, wall = green > 0, (red == 0) & (green == PALETTE["facade"][1])
        texture = np.where(built, 1 + 0.025 * self.noise(90, 90), 1)
        stains, streaks = self.noise(10, 10), self.noise(60, 3)
        texture += np.where(wall, 0.03 * (stains + streaks), 0)
        if self.chance(0.35):
            texture[wall] *= self.brickwork()[wall]
        light = np.asarray(self.light.reduce(2), np.float32) / 255
        light = light * (1 + 0.05 * self.noise(3, 3)) * self.cast_shadow()

        # Sunlight is warm or neutral, and what it does not reach is lit by the sky.
        sun = np.array([1.06, 1.0, 0.9] if self.chance(0.5) else [0.98, 1.0, 1.03], np.float32)
        shade = np.array([0.9, 0.97, 1.1], np.float32)
        exposure = np.float32(self.rng.uniform(0.92, 1.2))
        photo = np.asarray(self.pigments.reduce(2), np.float32) * (texture * light * exposure)[..., None]
        photo *= shade + (sun - shade) * light[..., None]
        photo += self.rng.standard_normal((SIZE, SIZE, 3), np.float32) * np.float32(self.rng.uniform(1.5, 4))
        picture = Image.fromarray(np.clip(photo, 0, 255).astype(np.uint8))
        return picture.filter(ImageFilter.GaussianBlur(self.rng.uniform(0.2, 0.6)))

    def noise(self, columns: int, rows: int) -> np.ndarray:
        """Smooth noise, float32 (256, 256), about that many bumps across and down, about unit size."""
        coarse = Image.fromarray(self.rng.standard_normal((rows, columns), np.float32))
        return np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC))

    def brickwork(self) -> np.ndarray:
        y, x = np.mgrid[:SIZE, :SIZE].astype(np.int16)
        row, shifted = y // 4, x + 5 * (y // 4 % 2)
        bricks = 0.97 + 0.09 * self.rng.standard_normal((SIZE, SIZE), np.float32)[row, shifted // 10]
        return np.where((y % 4 == 0) | (shifted % 10 == 0), np.float32(1.14), bricks)

    def cast_shadow(self) -> np.ndarray:
        """The shadow of the houses across the street, or none."""
        cast = Image.new("F", (64, 64), 1)  # coarse, so that its edge is soft
        if self.chance(0.45):
            eaves, ridge = self.between(30, 55), self.between(20, 55)
            roofs = [(0, eaves), (15, ridge), (30, eaves), (30, ridge), (64, ridge), (64, 64), (0, 64)]
            ImageDraw.Draw(cast).polygon(roofs, 0.6)
        return np.asarray(cast.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _ink(colour) -> tuple[int, ...]:
    return tuple(np.asarray(colour).astype(int).tolist())  # Pillow clips to 0 ... 255
