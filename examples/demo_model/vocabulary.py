"""The demo model's tokenizer: converts a prompt in any spelling to known words and pitches.

It is a standard `tokenizer.json` (normaliser, split, word level), which transformers can load. A frequency or note name
becomes the nearest quarter tone. Words outside the vocabulary and all text after `MAX_CHARS` are dropped. A tempo
becomes one word without its value; a conditioner reads the value from the prompt (`TEMPO_PATTERN`).
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

FIRST_PITCH, LAST_PITCH = 8, 160  # range of the pitches in the vocabulary, in quarter tones: 51.9 Hz to 4.19 kHz
MAX_TOKENS = 16
# How many characters of a prompt are read. The rewrites take up to 0.25 ms per character.
MAX_CHARS = 2000

_RHYTHMIC = (
    "kicks?|drums?|(?:break ?)?beats?|loops?|grooves?|house|techno|disco|edm|dubstep|trap|drum (?:and|n|&) bass|floor"
    "|metronomes?|click ?tracks?|clicks?|hats?|claps?|snares?|cowbells?|patterns?|arps?|arpeggios?"
)
_LIKELY_TEMPO = r"(?<![\d.])((?:[4-9]\d|1\d\d|2[0-4]\d)(?:\.\d+)?)(?!\d|\.\d)"
_NO_UNIT = r"(?!\s*-?\s*(?:k?hz|hertz|m?s\b|m?sec|milli|min|bars?|beats\b|steps?|times|notes?|%|db|/))"
TEMPO_PATTERN = (
    r"(?<![\d.])(\d{2,3}(?:\.\d+)?)(?=\s*-?\s*(?:bpm\b|b\.p\.m|beats?\s+(?:per|a|/)\s*min|beats?/min))"
    r"|(?:\btempo\b|\bbpm\b)\s*(?:of|is|at|=|:|to)?\s*(\d{2,3}(?:\.\d+)?)\b"
    rf"|\b(?:{_RHYTHMIC})\s*(?:at\b|[,@:(-])?\s*{_LIKELY_TEMPO}{_NO_UNIT}"
    rf"|{_LIKELY_TEMPO}(?=\s+(?:rock\s+|hip\s*hop\s+)?(?:{_RHYTHMIC})\b)"
)

_VOICES = ("sine", "square", "saw", "triangle", "organ", "pad", "pluck", "flute", "piano", "bell", "bass")
_PITCHED = ("chord", "arpeggio", "major", "minor", "sweep", "up", "down", "laser", "siren", "alarm")
_DRUMS = ("kick", "snare", "hat", "clap", "tom", "cowbell", "click", "cymbal", "metronome", "drums", "house")
_TEXTURES = ("loop", "bpm", "noise", "white", "pink", "brown", "wind", "rain", "ocean", "silence")
_MODIFIERS = ("left", "right", "lefttoright", "righttoleft", "quiet", "loud", "fadein", "fadeout")
WORDS = _VOICES + _PITCHED + _DRUMS + _TEXTURES + _MODIFIERS

_SPACED = r"(?<![^\s]){}(?![^\s])"  # matches {} only as whole words between spaces

# (regular expression, replacement), applied in this order to whole words of lower-case text with single spaces.
_SYNONYMS: tuple[tuple[str, str], ...] = (
    (r"(?:4|four) (?:on|to) (?:the )?floor", "kick loop"),
    (r"middle c", "c4"),
    (r"concert (?:a|pitch)|a ?4(?:40|32)(?! hz)", "a4"),
    (r"left(?: (?:channel|speaker|side|ear))? (?:to|into|towards?) (?:the )?right", "lefttoright"),
    (r"right(?: (?:channel|speaker|side|ear))? (?:to|into|towards?) (?:the )?left", "righttoleft"),
    (r"low(?: (?:pitch|frequency|note))? to high", "up"),
    (r"high(?: (?:pitch|frequency|note))? to low", "down"),
    (r"fad(?:e|es|ed|ing) (?:slowly |gently |gradually |smoothly )?in|fadein|fade ins", "fadein"),
    (
        r"(?:starts? |starting )?(?:quiet(?:ly)? and )?(?:gets?|getting|grows?|growing|becom(?:es?|ing)) louder",
        "fadein",
    ),
    (r"(?:gradually|slowly) louder|crescendo|swell(?:s|ing)?|build(?:s|ing)? up(?: from silence)?", "fadein"),
    (r"(?:increas(?:es|ing)|rising|growing|swelling) (?:in )?(?:volume|level|loudness)", "fadein"),
    (r"quiet to loud|soft to loud|silence to loud|(?:rises?|rising|emerg(?:es|ing)) from silence", "fadein"),
    (r"fad(?:e|es|ed|ing) (?:slowly |gently |gradually |smoothly )?(?:out|away|to silence|down|off)", "fadeout"),
    (r"fadeout|(?:gets?|getting|grows?|growing|becom(?:es?|ing)) (?:quieter|softer)", "fadeout"),
    (r"(?:gradually|slowly) (?:quieter|softer)|(?:fad|end)(?:s|es|ing) (?:to|in|into) (?:silence|nothing)", "fadeout"),
    (r"(?:decreas(?:es|ing)|falling|dropping) (?:in )?(?:volume|level|loudness)", "fadeout"),
    (r"(?:di|decre)(?:minuendo|scendo)|dy(?:ing|ies) away|dies away|loud to (?:quiet|soft|silence)", "fadeout"),
    (r"beats? (?:per|a) min(?:ute)?", "bpm"),
    (r"(?:on )?(?:each|every) beat", "loop"),
    (r"bass ?drums?|kick ?drums?|kicks?|kicking", "kick"),
    (r"snares?|snare drums?|rim ?shots?|gun ?shots?", "snare"),
    (r"(?:closed |open )?hi ?hats?|hats?|shakers?|maracas|tambourines?", "hat"),
    (r"(?:hand )?claps?|hand ?claps?|clapping", "clap"),
    (r"tom ?toms?|toms?|bongos?|congas?|timpani", "tom"),
    (r"cow ?bells?", "cowbell"),
    (r"(?:crash |ride )?cymbals?|crash|ride", "cymbal"),
    (r"click ?tracks?|metronomes?", "metronome"),
    (r"clicks?|clicking|ticks?|ticking|claves?|wood ?blocks?", "click"),
    (r"lasers?|laser (?:zap|shot|gun)s?|zaps?|pew", "laser"),
    (
        r"(?:four )?(?:house|techno|disco|edm|dance)(?: music)?(?: (?:drums?|beats?|grooves?|loops?|patterns?))*",
        "house",
    ),
    (
        r"(?:rock|pop|funk|hip ?hop|trap|jazz|dubstep|boom ?bap)(?: (?:beats?|grooves?|loops?|patterns?|drums?))*",
        "drums",
    ),
    (
        r"drums?(?: (?:beats?|grooves?|loops?|patterns?|machines?|kits?|breaks?|tracks?))*|break ?beats?|grooves?",
        "drums",
    ),
    (r"loops?|looping|looped|patterns?|beats?|rhythms?|pulses?|pulsing", "loop"),
    (r"white ?noise|static noise|hiss(?:ing)?|static|applause", "white noise"),
    (r"pink ?noise", "pink noise"),
    (r"(?:brown|red|brownian) noise", "brown noise"),
    (r"noises?|noisy", "noise"),
    (r"winds?|windy|breezes?|gusts?", "wind"),
    (r"rain(?:s|ing|fall|drops|storm)?(?: fall(?:s|ing))?|rainy|drizzle|shower", "rain"),
    (
        r"oceans?|seas?|seaside|waves? (?:crashing|breaking|on (?:the|a) (?:shore|beach))|surf|waterfalls?|rivers?",
        "ocean",
    ),
    (r"silen(?:ce|t|tly)|nothing|mute(?:d)?|no (?:sound|audio|noise)", "silence"),
    (r"risers?|up ?sweeps?", "sweep up"),
    (r"downers?|down ?sweeps?|pitch drops?", "sweep down"),
    (r"sweeps?|sweeping|gliss(?:ando)?|glides?|gliding|chirps?|slides?|sliding|portamento", "sweep"),
    (r"ris(?:es?|ing)|ascend(?:s|ing)?|upwards?|going up|goes up|increas(?:es|ing)|climb(?:s|ing)|up", "up"),
    (r"fall(?:s|ing)?|descend(?:s|ing)?|downwards?|going down|goes down|decreas(?:es|ing)|drop(?:s|ping)|down", "down"),
    (r"sirens?|police siren|ambulance", "siren"),
    (r"alarms?|alarm clock|buzzer", "alarm"),
    (r"sines?|sin|sinus|sinusoid(?:s|al)?|pure tones?|beeps?|hum(?:s|ming)?|theremin", "sine"),
    (r"squares?|pulse wave|chip ?tune|8 ?bit", "square"),
    (r"saws?|saw ?(?:tooth|teeth)s?|buzz(?:ing)?|brass|trumpets?|horns?|synth lead", "saw"),
    (r"triangles?|triangular|tri", "triangle"),
    (r"organs?", "organ"),
    (r"pads?|strings?|ambient pad|drones?|violins?|cellos?|choirs?", "pad"),
    (r"plucks?|plucked(?: strings?)?|guitars?|harps?|marimbas?|xylophones?|kalimba|banjo|ukulele", "pluck"),
    (r"flutes?|whistles?|recorder|ocarina|clarinets?", "flute"),
    (r"pianos?|electric pianos?|keys|rhodes", "piano"),
    (r"bells?|chimes?|glockenspiel|vibraphones?|celesta|music ?box", "bell"),
    (r"(?:sub ?|synth )?bass(?:es|line)?", "bass"),
    (r"chords?|triads?", "chord"),
    (r"arpeggi(?:os?|ated|ating|o)|arps?|broken chords?", "arpeggio"),
    (r"maj[79]?|majors?|sus[24]|aug(?:mented)?|add9", "major"),
    (r"m7?|min7?|minors?|dim(?:inished)?", "minor"),
    (
        r"quiet(?:ly|er)?|faint(?:ly)?|soft(?:ly)?|gentl[ey]|pianissimo|barely audible|(?:low|soft) (?:volume|level)",
        "quiet",
    ),
    (r"loud(?:ly|er)?|fortissimo|blasting|(?:high|full|max|maximum) (?:volume|level)", "loud"),
    (r"lefts?|leftmost|l (?:channel|speaker)", "left"),
    (r"rights?|rightmost|r (?:channel|speaker)", "right"),
)


# (regular expression, implied word). If the expression matches, the word is inserted at the beginning of the prompt.
_DRUMMED = "kick|snare|hat|clap|tom|cowbell|click|metronome|drums|house|arpeggio|pitch|chord|noise|alarm|siren|sweep"
_IMPLIED: tuple[tuple[str, str], ...] = (
    (r"^(?!.*(?:chord|arpeggio))(?=.*(?:major|minor))", "chord "),
    (r"^(?!.*(?:major|minor))(?=.*pitch)(?=.*(?:chord|arpeggio))", "major "),
    (rf"^(?!.*(?:{_DRUMMED}))(?=.*(?:bpm|loop))", "drums "),
)


def build_tokenizer() -> Tokenizer:
    """Build the tokenizer. The ids are `<pad>` 0, `<eos>` 1, `<bos>` 2, `<unk>` 3, then words and pitches.

    Encoding a prompt adds no special tokens.
    """
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary())}, unk_token="<unk>"))
    cut = normalizers.Replace(Regex(rf"(?m)\A.{{{MAX_CHARS}}}\K.+"), "")
    steps = [cut, normalizers.NFKC(), normalizers.Lowercase(), normalizers.NFD(), normalizers.StripAccents()]
    steps.append(cut)  # because NFKC makes up to 18 characters from one
    steps += [normalizers.Replace(Regex(pattern), content) for pattern, content in rewrites()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    return tokenizer


def vocabulary() -> list[str]:
    """Returns all tokens in order of their ids."""
    pitches = range(FIRST_PITCH, LAST_PITCH + 1)
    return ["<pad>", "<eos>", "<bos>", "<unk>", *WORDS, *map(pitch_token, pitches), *map(target_token, pitches)]


def pitch_token(index: int) -> str:
    """Returns the token for the pitch of the oscillator `index`."""
    return f"pitch{index}"


def target_token(index: int) -> str:
    """Returns the token for the pitch of the oscillator `index` as the end of a sweep."""
    return f"target{index}"


def write_tokenizer(folder: Path) -> None:
    """Write the tokenizer to `tokenizer.json` in `folder`."""
    build_tokenizer().save(str(folder / "tokenizer.json"))


def rewrites() -> list[tuple[str, str]]:
    """Returns all (regular expression, replacement) pairs, to be applied in order to a lower-case prompt."""
    number = r"\d+(?:\.\d+)?"
    steps = [
        ("♯", "#"),
        ("♭", "b"),
        ("@", " at "),
        (r"(?<=\d)-(?=k?hz|(?:kilo)?hertz)", " "),
        (r"(?<=\d|z|n)\s?\.\.+\s?(?=\d)", " to "),
        (r"(?<=\d),(?=\d{3}(?!\d))", ""),  # 1,000
        (r"(?<!\d)\d{1,2}/\d{1,2}(?!\d)", " "),  # 4/4
        (r"(?:kilo ?hertz|k ?hz|kcps)", " khz "),
        (r"(?<!k)(?:hertz|hz|cycles per second|cps)", " hz "),
        (r"(?<=left|right)\s*(?:[-–—=]+>|→)\s*", " to "),
        (rf"(?<=[\dz ])\s*(?:[-–—=]+>|→|~)\s*(?={number} *k?hz)", " to "),
        (rf"(?<=\d|hz |hz  )[-–—]\s*(?={number} *k?hz)", " to "),
        (rf"(?<=\d)\s[-–—]\s*(?={number} *k?hz)", " to "),
        (r"[-–—_/\\,;:!?\"“”„'’‘`(){}\[\]<>|*=+~…]", " "),
        (r"\.(?!\d)|(?<!\d)\.(?=\d{3,})", " "),
        (r"\s+", " "),
        (rf"{number} ?(?:b ?p ?m|beats? (?:per|a) min(?:ute)?s?)(?![a-z])", " bpm "),
        (rf"(?<![a-z])(?:tempo|bpm) (?:of |is |at |to )?{number}", " bpm "),
        (rf"{number} ?(?:ms|msecs?|milliseconds?|s|secs?|seconds?|mins?|minutes?)(?![a-z#])", " "),
        (r"\d+ (?:bars?|measures?|beats?|times|steps?|voices?|notes?)(?![a-z])", " "),
        (r"(?<![a-z])(?:about|around|roughly|approximately|approx|circa|exactly)(?![a-z])", " "),
        (r" (?:in |of )?(?:the )?octave (?=\d)", " "),
        (r" (?:in |of )?(?:the )?(?=\d(?:st|nd|rd|th) octave)", " "),
        (r"(?<=\d)(?:st|nd|rd|th) octave", ""),
        (r"(?<![a-z])(?:until|till|towards?|up to|down to|(?:ends?|ending) (?:at|on))(?![a-z])(?= \d| [a-g])", "to"),
        (r"\s+", " "),
        (rf"(?<=\d|z) and (?={number} k?hz)", " to "),
        (r" to an? (?=\d)", " to "),
        (r"(?<=\d|z) and to (?=\d)", " to "),
        (r"(?<![a-z])(?:tuned|set) to ", ""),
    ]
    steps += [(_SPACED.format(f"(?:{pattern})"), word) for pattern, word in _SYNONYMS[:3]]
    steps += [step for index in range(FIRST_PITCH, LAST_PITCH + 1) for step in _pitch_rewrites(index)]
    steps += [(r"\s+", " ")]
    steps += [(_SPACED.format(f"(?:{pattern})"), word) for pattern, word in _SYNONYMS]
    known = "|".join([*WORDS, r"(?:pitch|target)\d+"])
    steps += [(rf"(?<!\S)(?!(?:{known})(?!\S))\S+", " "), (r"(?<!\S)(\S+)(?=\s(?:.*\s)?\1(?!\S))", " ")]
    return [*steps, *_IMPLIED]


def _pitch_rewrites(index: int) -> list[tuple[str, str]]:
    """Returns (regular expression, replacement) pairs for the spellings of a pitch.

    After "to", the pitch is the end of a sweep. Elsewhere, it is the pitch of a sound or the start of a sweep.
    """
    named = _pitch_pattern(index)
    return [(rf"(?<= to ){named}", f" {target_token(index)} "), (named, f" {pitch_token(index)} ")]


def _pitch_pattern(index: int) -> str:
    hertz = [value for value in range(40, 4400) if _nearest_pitch(value) == index]
    kilo = sorted({form for value in range(4, 440) if _nearest_pitch(value * 10) == index for form in _decimals(value)})
    whole = "|".join(map(str, hertz)) or "(?!)"
    after_word = (
        r"(?<=sine |tone |wave |tooth |square |triangle |saw |sine at |tone at |wave at |frequency |frequency of )"
    )
    before_range = r"(?= (?:hz )?to +(?:\d+(?:\.\d+)? k?hz|target))"
    forms = [
        rf"(?<![\d.])(?:{whole})(?:\.\d+)? ?hz(?![a-z])",
        rf"(?<![\d.])(?:{'|'.join(map(re.escape, kilo)) or '(?!)'}) ?khz(?![a-z])",
        rf"{after_word}(?<![\d.])(?:{whole})(?![\d.a-z])(?! (?:bpm|k?hz))",
        rf"(?<![\d.])(?:{whole})(?:\.\d+)?(?= (?:sine|square|saw|triangle))",
        rf"(?<![\d.])(?:{whole})(?:\.\d+)?{before_range}",
    ]
    if index % 2 == 0:
        forms += _note_forms(index)
    return f"(?:{'|'.join(forms)})"


def _nearest_pitch(frequency_hz: float) -> int:
    return round(82 + 24 * math.log2(frequency_hz / 440))


def _decimals(hundredths: int) -> list[str]:
    """Returns the spellings of a number given in hundredths: 150 gives 1.5 and 1.50; 50 gives 0.5, .5 and 0.50."""
    text = f"{hundredths / 100:.2f}"
    forms = {text, text.rstrip("0").rstrip(".")}
    if text.endswith("0"):
        forms.add(text[:-1])
    return sorted(forms | {form[1:] for form in forms if form.startswith("0.")})


_BEFORE_NOTE = "(?<=note |key of |key |root )"
# Here, "a" before most words is the article: "a chord on a pad".
_BEFORE_LETTER = (
    "(?<=chord |triad |chord on |chord of |triad on |triad of | in )(?!a (?!at |on |for |with |and |bpm)[a-z ])"
)
# The verb "am", AM radio and FM synthesis are not chords.
_NO_CHORD = "[af]m (?!at |on |chord|triad|arp|pad|piano|organ|pluck|guitar|bpm)"
_LETTERS = {"c": 0, "d": 2, "e": 4, "f": 5, "g": 7, "a": 9, "b": 11}
_SIGNS = {"": 0, r"(?:#| sharp|sharp)": 1, r"(?:b| flat|flat)": -1}


def _note_forms(index: int) -> list[str]:
    """Returns regular expressions for the spellings of the note at an oscillator index; none if it is not a note.

    The octave number 4 may be omitted if the context shows that the letter is a note.
    """
    midi = 69 + (index - 82) // 2
    with_octave, without = [], []
    for letter, semitone in _LETTERS.items():
        for sign, shift in _SIGNS.items():
            octave, rest = divmod(midi - 12 - semitone - shift, 12)
            if rest == 0:
                with_octave.append(rf"{letter}{sign} ?{octave}")
                if octave == 4:
                    without.append(f"{letter}{sign}")
    not_a_count = r"(?![\w#.])(?! (?:bars?|beats?|x|parts?|measures?|times|voices?|th|st|nd|rd|k?hz)(?![a-z]))"
    forms = [rf"(?<![\w#])(?:{'|'.join(with_octave)}){not_a_count}"] if with_octave else []
    if without:
        name = "|".join(without)
        forms += [
            rf"(?<![\w#])(?:{name})(?= ?(?:major|minor|maj|min|dim|sus|aug|add9)(?![a-z]))",
            rf"(?<![\w#])(?:{name})(?= ?m7? (?:chord|triad|arpeggio))",
            rf"(?<![\w#])(?!a )(?:{name})(?= (?:7 )?(?:chord|triad|arpeggio))",
            rf"(?<![\w#])(?:{name})(?=7 (?:chord|triad|arpeggio))",
            rf"(?<![\w#])(?<!i |\d )(?!{_NO_CHORD})(?:{name})(?=m7?(?![\w#]))",
            rf"{_BEFORE_NOTE}(?:{name})(?![\w#])(?! (?:sharp|flat|\d))",
            rf"{_BEFORE_LETTER}(?:{name})(?![\w#])(?! (?:sharp|flat|\d))",
            rf"(?:^ ?|(?<=^a | a |^an | an ))(?:{name})(?= on |$)",
        ]
    return forms
