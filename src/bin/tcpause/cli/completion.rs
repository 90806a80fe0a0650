//! Completions for the shells.
#![expect(
    clippy::format_push_string,
    reason = "a page is made once; what counts is that its code reads like it"
)]

use tcpause::settings::Completion;

use super::{
    Client,
    commands::{COMMANDS, SHELLS, Word, unit_names},
    options::{OPTIONS, Opt},
    topics::{help_names, topic_names},
};

pub(crate) fn bash() -> String {
    let words = COMMANDS.each_ref().map(|command| command.name).join(" ");
    let names = client_names("|");
    let mut cases = String::new();
    for word in clients() {
        cases += &bash_case(word.name, word.options);
    }
    let run: Vec<&Opt> = OPTIONS.iter().collect();
    cases += &bash_case("*", &run);
    let (shells, units) = (SHELLS.join(" "), unit_names(" "));
    let pages = help_names().collect::<Vec<_>>().join(" ");
    format!(
        "\
# bash completion for tcpause

# Offers commands (-c) or files (-f).
_tcpause_offer() {{
    compopt -o filenames
    mapfile -t COMPREPLY < <(compgen \"$1\" -- \"$2\")
}}

# What exec runs, from this word on, has completions of its own, if the package for that is there.
_tcpause_program() {{
    if declare -F _command_offset > /dev/null; then
        _command_offset \"$1\"
    elif (($1 == COMP_CWORD)) && [[ $2 != */* ]]; then
        _tcpause_offer -c \"$2\"
    else
        _tcpause_offer -f \"$2\"
    fi
}}

_tcpause() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command= words= names= at
    COMPREPLY=()
    # The command is the first word of its own.
    for ((at = 1; at < COMP_CWORD; at++)); do
        case ${{COMP_WORDS[at]}} in
            {names}) command=${{COMP_WORDS[at]}}; break ;;
        esac
    done
    if [[ $command == exec ]]; then
        # Behind the options and their values, which bash splits at = and :, is what it runs.
        for ((at++; at < COMP_CWORD; at++)); do
            case ${{COMP_WORDS[at]}} in
                --) ((at++)); break ;;
                -h|--help) ;;
                -*)
                    [[ ${{COMP_WORDS[at+1]}} == = ]] && ((at++))
                    ((at++))
                    while [[ ${{COMP_WORDS[at+1]}} == : ]]; do ((at += 2)); done ;;
                *) break ;;
            esac
        done
        if ((at < COMP_CWORD)) || [[ $at == \"$COMP_CWORD\" && ($word != -* || $before == --) ]]; then
            _tcpause_program $at \"$word\"
            return
        fi
    fi
    # file:PATH is split, too.
    if [[ $before$word == file: || ${{COMP_WORDS[COMP_CWORD-2]}}$before == file: ]]; then
        _tcpause_offer -f \"${{word#:}}\"
        return
    fi
    # bash splits --option=value into three words.
    if [[ $word == = ]]; then
        word=
    elif [[ $before == = ]]; then
        before=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    case $command:$before in
{cases}    esac
    case $before in
        completion) words=\"{shells}\" ;;
        unit) words=\"{units}\" ;;
        fleet) words=forget ;;
        help) words=\"{pages}\" ;;
        *)
            if [[ -z $words && $word == -* ]]; then
                words=$names
            elif [[ -z $words && -z $command ]]; then
                words=\"{words}\"
            fi ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$word\")
}}
complete -F _tcpause tcpause
"
    )
}

/// Returns the branches of `case` for the options of a command: one for each kind of value, and one for the options' names.
fn bash_case(command: &str, options: &[&Opt]) -> String {
    let mut text = String::new();
    let mut branch = |chosen: &[&Opt], offer: &str| {
        let names = chosen.iter().flat_map(|opt| spellings(opt));
        let patterns: Vec<String> = names.map(|name| format!("{command}:{name}")).collect();
        if !patterns.is_empty() {
            text += &format!("        {}) {offer} ;;\n", patterns.join("|"));
        }
    };
    let taking = |is_it: fn(&Completion) -> bool| -> Vec<&Opt> {
        let chosen = |opt: &&&Opt| opt.value.is_some() && is_it(&opt.completion);
        options.iter().filter(chosen).copied().collect()
    };
    branch(
        &taking(|completion| matches!(completion, Completion::File)),
        "_tcpause_offer -f \"$word\"; return",
    );
    branch(
        &taking(|completion| matches!(completion, Completion::Group)),
        "mapfile -t COMPREPLY < <(compgen -g -- \"$word\"); return",
    );
    branch(&taking(|completion| matches!(completion, Completion::None)), "return");
    for opt in options {
        if let Completion::Choices(values) = opt.completion {
            branch(&[opt], &format!("words=\"{}\"", values.join(" ")));
        }
    }
    let names: Vec<String> = options.iter().flat_map(|opt| spellings(opt)).collect();
    text + &format!("        {command}:*) names=\"{}\" ;;\n", names.join(" "))
}

pub(crate) fn zsh() -> String {
    let mut text = "#compdef tcpause\n\n_tcpause() {\n    local -a commands=(\n".to_owned();
    for command in &COMMANDS {
        text += &format!("        '{}:{}'\n", command.name, zsh_text(command.help));
    }
    text += &format!("    )\n    case ${{words[(r)({})]}} in\n", client_names("|"));
    for word in clients() {
        text += &format!("        {})\n            _arguments -s -S \\\n", word.name);
        for opt in word.options {
            text += &format!("                {} \\\n", zsh_option(opt));
        }
        let rest = match word.client {
            Some(Client::Exec) => " '*:::command:_normal'",
            Some(Client::Fleet) => " '2:word:(forget)'",
            _ => "",
        };
        text += &format!(
            "                '1:command:{{_describe command commands}}'{rest}\n            return ;;\n"
        );
    }
    text += "    esac\n    _arguments -s -S \\\n";
    for opt in OPTIONS.iter() {
        text += &format!("        {} \\\n", zsh_option(opt));
    }
    let (shells, units) = (SHELLS.join(" "), unit_names(" "));
    let topics = topic_names().collect::<Vec<_>>().join(" ");
    text += "        '1:command:{_describe command commands}' \\\n";
    text += &format!(
        "        '2:argument:{{case $line[1] in completion) compadd {shells} ;; unit) compadd {units} ;; help) _describe command commands; compadd {topics} ;; esac}}'\n}}\n\n"
    );
    text += "if [[ $funcstack[1] == _tcpause ]]; then _tcpause \"$@\"; else compdef _tcpause tcpause; fi\n";
    text
}

/// Returns the specification of an option for `_arguments`.
fn zsh_option(opt: &Opt) -> String {
    let equals = if opt.value.is_some() { "=" } else { "" };
    let names = match opt.short {
        Some(short) => {
            let attached = if opt.value.is_some() { "+" } else { "" };
            format!(
                "'(-{short} --{long})'{{-{short}{attached},--{long}{equals}}}'",
                long = opt.long
            )
        }
        None => format!("'--{}{equals}", opt.long),
    };
    let value = match (opt.value, &opt.completion) {
        (None, _) => String::new(),
        (Some(value), Completion::None) => format!(":{value}: "),
        (Some(value), Completion::File) => format!(":{value}:_files"),
        (Some(value), Completion::Group) => format!(":{value}:_groups"),
        (Some(value), Completion::Choices(values)) => {
            format!(":{value}:({})", zsh_text(&values.join(" ")))
        }
    };
    format!("{names}[{}]{value}'", zsh_text(opt.help))
}

pub(crate) fn fish() -> String {
    let mut text = "# fish completion for tcpause\ncomplete -c tcpause -f\n".to_owned();
    for command in &COMMANDS {
        text += &format!(
            "complete -c tcpause -n __fish_use_subcommand -a {} -d {}\n",
            command.name,
            fish_text(command.help)
        );
    }
    let pages = help_names().collect::<Vec<_>>().join(" ");
    for (word, offer) in [
        ("completion", SHELLS.join(" ")),
        ("unit", unit_names(" ")),
        ("fleet", "forget".to_owned()),
        ("help", pages),
    ] {
        text +=
            &format!("complete -c tcpause -n '__fish_seen_subcommand_from {word}' -a '{offer}'\n");
    }
    let names = client_names(" ");
    for opt in OPTIONS.iter() {
        text += &fish_option(&format!("not __fish_seen_subcommand_from {names}"), opt);
    }
    for word in clients() {
        for opt in word.options {
            text += &fish_option(&format!("__fish_seen_subcommand_from {}", word.name), opt);
        }
        if word.runs_program() {
            text += &format!(
                "complete -c tcpause -n '__fish_seen_subcommand_from {}' -F -a '(__fish_complete_command)'\n",
                word.name
            );
        }
    }
    text
}

fn fish_option(condition: &str, opt: &Opt) -> String {
    let short = opt.short.map_or_else(String::new, |short| format!("-s {short} "));
    let value = match (opt.value, &opt.completion) {
        (None, _) => String::new(),
        (Some(_), Completion::None) => "-x ".to_owned(),
        (Some(_), Completion::File) => "-r -F ".to_owned(),
        (Some(_), Completion::Group) => "-x -a '(__fish_complete_groups)' ".to_owned(),
        (Some(_), Completion::Choices(values)) => format!("-x -a '{}' ", values.join(" ")),
    };
    format!(
        "complete -c tcpause -n '{condition}' {short}-l {} {value}-d {}\n",
        opt.long,
        fish_text(opt.help)
    )
}

/// Returns the commands that have options of their own.
fn clients() -> impl Iterator<Item = &'static Word> {
    COMMANDS.iter().filter(|word| word.client.is_some())
}

fn client_names(separator: &str) -> String {
    clients().map(|word| word.name).collect::<Vec<_>>().join(separator)
}

/// Returns `-c` and `--config`, or the long name alone.
fn spellings(opt: &Opt) -> Vec<String> {
    opt.short
        .map(|short| format!("-{short}"))
        .into_iter()
        .chain([format!("--{}", opt.long)])
        .collect()
}

/// Escapes text for a place inside single quotes and square brackets.
fn zsh_text(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('[', "\\[")
        .replace(']', "\\]")
        .replace(':', "\\:")
        .replace('\'', "'\\''")
}

/// Puts a word into single quotes.
fn fish_text(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shell_knows_every_option_and_command() {
        for opt in OPTIONS.iter() {
            assert!(bash().contains(&format!("--{}", opt.long)));
            assert!(zsh().contains(&format!("--{}", opt.long)));
            assert!(fish().contains(&format!("-l {} ", opt.long)));
        }
        for opt in COMMANDS.iter().flat_map(|command| command.options) {
            assert!(bash().contains(&format!("--{}", opt.long)));
            assert!(zsh().contains(&format!("--{}", opt.long)));
            assert!(fish().contains(&format!("-l {} ", opt.long)));
        }
        let topics = topic_names().collect::<Vec<_>>().join(" ");
        for text in [bash(), zsh(), fish()] {
            assert!(text.contains(&topics), "{text}");
            for command in &COMMANDS {
                assert!(text.contains(command.name));
            }
        }
    }

    #[test]
    fn special_characters_are_quoted() {
        assert_eq!(zsh_text("it's [a]: b"), "it'\\''s \\[a\\]\\: b");
        assert_eq!(fish_text("it's \\"), "'it\\'s \\\\'");
    }
}
