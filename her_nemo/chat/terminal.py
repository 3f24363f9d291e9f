"""`her-nemo chat` in the terminal: lines are what you say, words after a slash are what you want done."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import sys
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.rule import Rule
from rich.text import Text

from her_nemo.chat.exports import RowFiles, pair_row
from her_nemo.chat.players import Players, Progress
from her_nemo.chat.scenes import Scene
from her_nemo.chat.session import ChatSession, pieces_so_far
from her_nemo.chat.terminal_view import (
    SOFT,
    choice_view,
    counted,
    safe,
    scene_table,
    scene_view,
    streaming_view,
    turn_view,
)
from her_nemo.config.chat import ChatConfig
from her_nemo.config.errors import UserError, nearest
from her_nemo.data.readers.coser import ENVIRONMENT
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.layouts import Layout
from her_nemo.roleplay.names import same_name

SHOWN_SCENES = 30
BREAK = "⏎"
_FOLDS = {
    "plans": frozenset({Kind.SYSTEM_THINKING}),
    "thoughts": frozenset({Kind.ROLE_THINKING}),
    "all": frozenset({Kind.SYSTEM_THINKING, Kind.ROLE_THINKING}),
    "nothing": frozenset(),
}
PLAN_NOTE = "Plans are a developer's view: no character knows them, and no reader is meant to."

HELP = """A line is what you say; *between stars* you act. The model answers as {lead}.

  /go              let the model answer without saying anything
  /as NAME         speak as somebody else from now on (you are {me})
  /lead TEXT       write {lead}'s turn yourself: <role_thinking>..</role_thinking>, *action*, speech
  /partner [NAME]  let a model play the other side's next turn
  /again           another reply in place of the last one
  /ab              another reply beside the last one: choose, and the pair is kept
  /use N           let text N of the last turn count
  /edit [TEXT]     mend the last turn (with #3 before the text: turn 3), in HER's tags
  /back [N]        take back the last N turns (1)
  /show WHAT       unfold plans, thoughts, all or nothing (now: {shown})
  /who             the scene, and who plays whom
  /export          samples of {lead}'s turns, to train on
  /scene           another scene
  /quit            leave (Ctrl-D does too); Ctrl-C stops a reply
"""


class _Leave(Exception):
    """The person has had enough."""


class _AnotherScene(Exception):
    """The person wants another scene."""


@dataclass
class Terminal:
    """One person at a terminal.

    `read` asks for a line: its prompt and what stands in it to begin with. It raises EOFError at the end of the input.
    """

    cfg: ChatConfig
    scenes: Sequence[Scene]
    players: Players
    files: RowFiles
    runner: asyncio.Runner
    console: Console
    read: Callable[[str, str], str]
    unfolded: frozenset[Kind] = frozenset()
    me: str = ""
    session: ChatSession = field(init=False)

    def run(self) -> int:
        """Play until the person leaves."""
        scene, character = self.cfg.scene, self.cfg.character
        with contextlib.suppress(_Leave):
            while True:
                self._begin(scene, character)
                scene = character = None
                with contextlib.suppress(_AnotherScene):
                    self._converse()
        self.console.print(Text("Until next time.", style=SOFT))
        return 0

    # ------------------------------------------------------------ the scene

    def _begin(self, number: int | None, character: str | None) -> None:
        scene = self.scenes[number if number is not None else self._ask_scene()]
        names = [part.name for part in scene.parts]
        if character is None:
            character = names[0] if len(names) == 1 else self._ask("Whom shall the model play?", names)
        self.session = ChatSession.begin(
            scene,
            character,
            f"s{secrets.token_hex(4)}",
            turns=self.cfg.turns,
            layout=Layout(self.cfg.layout),
            own_partner=self.players.own_partner,
        )
        self.me = self._my_part()
        self.console.print(scene_view(self.session))
        self._show_turns(range(len(self.session.turns)))
        self.console.print(Text(f"You are {self.me}. /help says what you can do.\n", style=SOFT))

    def _my_part(self) -> str:
        """Whoever spoke last besides the lead, rather than the Environment."""
        spoke = [turn.speaker for turn in reversed(self.session.turns)]
        known = [name for name in (*spoke, *self.session.others) if not self.session.is_lead(name)]
        people = [name for name in known if not same_name(name, ENVIRONMENT)]
        return (people or known)[0]

    def _ask_scene(self) -> int:
        if len(self.scenes) == 1:
            return 0
        self.console.print(scene_table(self.scenes[:SHOWN_SCENES]))
        if len(self.scenes) > SHOWN_SCENES:
            self.console.print(Text(f"... up to {len(self.scenes) - 1}", style=SOFT))
        return int(self._ask("Which scene?", [str(number) for number in range(len(self.scenes))], listed=False))

    def _ask(self, question: str, choices: Sequence[str], *, listed: bool = True) -> str:
        """One of the choices, by its number or its name; an empty line takes the first."""
        if listed:
            for number, choice in enumerate(choices):
                self.console.print(Text.assemble((f"{number} ", "bold"), safe(choice)))
        while True:
            said = self._line(f"{question} [0] ").strip() or "0"
            if said.isdecimal() and int(said) < len(choices):
                return choices[int(said)]
            if said in choices:
                return said
            close = nearest(said, choices)
            self._complain(f"no {said!r}" + (f": did you mean {close}?" if close else ""))

    # ------------------------------------------------------------ talking

    def _converse(self) -> None:
        if self.session.turns and not self.session.is_lead(self.session.turns[-1].speaker):
            self._guarded(lambda: self._play(self.session.lead))
        while True:
            line = self._line(f"{self.me}> ").strip()
            if line:
                self._guarded(lambda line=line: self._obey(line))

    def _guarded(self, act: Callable[[], None]) -> None:
        """What goes wrong is said, and the conversation goes on."""
        try:
            act()
        except UserError as error:
            self._complain(str(error))

    def _obey(self, line: str) -> None:
        if not line.startswith("/"):
            self.session.say(self.me, line)
            self._show_turns([len(self.session.turns) - 1])
            self._play(self.session.lead)
            return
        word, _, rest = line[1:].partition(" ")
        command = _COMMANDS.get(word)
        if command is None:
            close = nearest(word, _COMMANDS)
            raise UserError(f"no command /{word}" + (f": did you mean /{close}?" if close else "") + " (/help)")
        command(self, rest.strip())

    def _play(self, speaker: str) -> None:
        """A new turn by a model."""
        text, progress = self._stream(speaker, None)
        if text:
            self.session.add(speaker, text, finished=bool(progress.finished))
            self._after(progress)

    def _stream(self, speaker: str, before: int | None) -> tuple[str, Progress]:
        """A reply, shown while it comes; Ctrl-C ends it where it is."""
        progress = Progress("")

        async def receive(show: Callable[[Any], None]) -> None:
            nonlocal progress
            async with aclosing(self.players.play(self.session, speaker, before)) as pieces:
                try:
                    async for progress in pieces:
                        so_far = pieces_so_far(speaker, progress.text)
                        show(streaming_view(self.session, speaker, so_far, self.unfolded, self._room()))
                except asyncio.CancelledError:
                    return  # Ctrl-C: what has come is kept

        if self.console.is_terminal:
            waiting = streaming_view(self.session, speaker, [], self.unfolded, self._room())
            with Live(waiting, console=self.console, transient=True, refresh_per_second=12) as live:
                self.runner.run(receive(live.update))
        else:
            self.runner.run(receive(lambda _: None))
        if not progress.text.strip():
            self._complain("stopped" if progress.finished is None else f"the model wrote nothing for {speaker}")
            return "", progress
        return progress.text, progress

    def _room(self) -> int:
        """Signs of a reply that are shown while it comes in: about what fits on the screen."""
        return self.console.width * max(4, self.console.height - 8)

    def _after(self, progress: Progress) -> None:
        self._show_turns([len(self.session.turns) - 1])
        if progress.dropped:
            note = f"The model was not told of the oldest {counted(progress.dropped, 'exchange')}, for want of room."
            self.console.print(Text(note, style=SOFT))

    # ------------------------------------------------------------ commands

    def help(self, rest: str) -> None:
        shown = next(name for name, kinds in _FOLDS.items() if kinds == self.unfolded)
        self.console.print(Text(HELP.format(lead=self.session.lead, me=self.me, shown=shown)))

    def go(self, rest: str) -> None:
        self._play(self.session.lead)

    def speak_as(self, rest: str) -> None:
        name = self.session.spelt(rest)
        if self.session.is_lead(name):
            raise UserError(f"the model plays {name}; /lead TEXT writes a turn for him")
        self.me = name
        self.console.print(Text(f"You are {name}.", style=SOFT))

    def lead(self, rest: str) -> None:
        self._show_turns([self.session.say(self.session.lead, rest)])

    def partner(self, rest: str) -> None:
        name = self.session.spelt(rest) if rest else self.me
        if self.session.is_lead(name):
            raise UserError("/partner is for the others; /go lets the model answer as the lead")
        self._play(name)

    def again(self, rest: str) -> None:
        number = self._last()
        text, progress = self._stream(self.session.turn(number).speaker, number)
        if text:
            self.session.add_alternative(number, text, finished=bool(progress.finished))
            self._after(progress)

    def compare(self, rest: str) -> None:
        number = self._last()
        turn = self.session.turn(number)
        if not self.session.is_lead(turn.speaker):
            raise UserError(f"pairs are made of {self.session.lead}'s turns: let him answer first")
        text, progress = self._stream(turn.speaker, number)
        if not text:
            return
        old = turn.chosen
        new = self.session.add_alternative(number, text, finished=bool(progress.finished), choose=False)
        # Which stands left is drawn, so that a habit of the reader favours neither.
        sides = random.sample([old, new], 2)
        candidates = self.session.turn(number).candidates
        texts = {letter: candidates[side].text for letter, side in zip("AB", sides, strict=True)}
        self.console.print(choice_view(self.session, texts, self.unfolded))
        said = ""
        while said not in ("a", "b", "n"):
            said = self._line("Which is better? a, b, or n for neither: ").strip().lower()
        if said == "n":
            return
        better, worse = sides if said == "a" else reversed(sides)
        row = pair_row(self.session, number, better, worse)
        count = self.files.write_pair(row)
        self.session.choose(number, better)
        self._show_turns([number])
        self.console.print(Text(f"Kept: {counted(count, 'pair')} in {self.files.pairs}", style=SOFT))

    def use(self, rest: str) -> None:
        number = self._last()
        self.session.choose(number, _number(rest, "/use") - 1)
        self._show_turns([number])

    def edit(self, rest: str) -> None:
        number = self._last()
        if rest.startswith("#"):
            word, _, rest = rest[1:].partition(" ")
            number = _number(word, "/edit #") - 1
        turn = self.session.turn(number)
        # The line has one line: a break inside the turn stands in it as a sign.
        text = rest.strip() or self._line("mend> ", turn.text.replace("\n", BREAK)).replace(BREAK, "\n")
        self.session.edit(number, text)
        self._show_turns([number])

    def back(self, rest: str) -> None:
        count = _number(rest, "/back") if rest else 1
        left = max(0, len(self.session.turns) - count)
        self.session.rewind(left)
        self.console.print(Text(f"{counted(left, 'turn')} {'is' if left == 1 else 'are'} left.", style=SOFT))

    def show(self, rest: str) -> None:
        if rest not in _FOLDS:
            raise UserError(f"/show {' | '.join(_FOLDS)}")
        self.unfolded = _FOLDS[rest]
        self.console.print(Rule(style=SOFT))
        self._show_turns(range(len(self.session.turns)))
        if Kind.SYSTEM_THINKING in self.unfolded:
            self.console.print(Text(PLAN_NOTE, style=SOFT))

    def who(self, rest: str) -> None:
        self.console.print(scene_view(self.session))
        self.console.print(Text(f"You are {self.me}.", style=SOFT))

    def export(self, rest: str) -> None:
        count, left_out = self.files.write_samples(self.session)
        for item in left_out:
            self.console.print(Text(f"turn {item.turn + 1} left out: {item.reason}", style="red"))
        self.console.print(Text(f"{counted(count, 'sample')} in {self.files.samples}", style=SOFT))

    def another(self, rest: str) -> None:
        raise _AnotherScene

    def leave(self, rest: str) -> None:
        raise _Leave

    # ------------------------------------------------------------ small things

    def _last(self) -> int:
        if not self.session.turns:
            raise UserError("nothing was said yet")
        return len(self.session.turns) - 1

    def _show_turns(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.console.print(turn_view(self.session, number, self.unfolded))

    def _complain(self, text: str) -> None:
        self.console.print(Text(safe(text), style="red"))

    def _line(self, prompt: str, given: str = "") -> str:
        while True:
            try:
                return self.read(prompt, given)
            except EOFError:
                raise _Leave from None
            except KeyboardInterrupt:
                self.console.print(Text("\n(/quit leaves)", style=SOFT))


_COMMANDS: dict[str, Callable[[Terminal, str], None]] = {
    "help": Terminal.help,
    "go": Terminal.go,
    "as": Terminal.speak_as,
    "lead": Terminal.lead,
    "partner": Terminal.partner,
    "again": Terminal.again,
    "ab": Terminal.compare,
    "use": Terminal.use,
    "edit": Terminal.edit,
    "back": Terminal.back,
    "show": Terminal.show,
    "who": Terminal.who,
    "export": Terminal.export,
    "scene": Terminal.another,
    "quit": Terminal.leave,
}


def _number(text: str, command: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{command} takes a number from 1")
    return int(text)


def read_line(prompt: str, given: str = "") -> str:
    """A line from standard input, with the editing keys of readline where there is a terminal."""
    if not sys.stdin.isatty():
        return input()
    import readline

    readline.set_startup_hook(lambda: readline.insert_text(given))
    try:
        return input(prompt)
    finally:
        readline.set_startup_hook(None)
